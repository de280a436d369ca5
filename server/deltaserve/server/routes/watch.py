"""Watch: looks at what came of routes, and rolls them back, holds them, or moves their weights."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from deltaserve.server.errors import RequestError, StateUnavailable
from deltaserve.server.experiments.bandit import mean_shares, rate_shares
from deltaserve.server.experiments.guardrails import Decision, Loss, Rate, judge
from deltaserve.server.experiments.samples import Sample
from deltaserve.server.ledger.tally import Ledger, Tallies, Tally
from deltaserve.server.routes.book import SERVER, RouteBook
from deltaserve.server.routes.route import WAITS, Guardrail, Metric, Route, Standing, State

log = logging.getLogger(__name__)

SECONDS = 5.0
"""Between two looks."""
LEVEL = 0.05
"""Most probability that a route without harm is ever rolled back by its guardrails in an epoch."""
MISMATCH = 0.001
"""The customary p-value below which arms do not have the users that their weights say."""
_LIMITED: dict[Metric, Callable[[Guardrail], float]] = {
    Metric.SLOW: lambda rail: rail.seconds,
    Metric.SLOW_FIRST_TOKEN: lambda rail: rail.seconds,
    Metric.LONG: lambda rail: rail.tokens,
}


class Watch:
    """clock: `time.time`."""

    def __init__(
        self, book: RouteBook, ledger: Ledger, clock: Callable[[], float] = time.time
    ) -> None:
        self._book = book
        self._ledger = ledger
        self._clock = clock

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(SECONDS)
            await self.look()

    async def look(self) -> None:
        """At every route, once. What goes wrong with one does not keep the others from it. Then
        write what could not be written when it changed."""
        for standing in self._book.all():
            try:
                await self._look(standing)
            except RequestError as error:
                log.warning("route=%s: %s", standing.route.name, error)
            except Exception:
                log.exception("route=%s: its outcomes could not be judged", standing.route.name)
        try:
            await self._book.write()
        except StateUnavailable as error:
            log.warning("routes hold that are not written: %s", error)

    async def _look(self, standing: Standing) -> None:
        route, name, epoch = standing.route, standing.route.name, standing.epoch
        moves = route.ramp is not None or route.bandit is not None
        if standing.state is State.ROLLED_BACK or not (route.guardrails or moves):
            return
        rails = route.guardrails.items()
        limits = {
            metric.value: _LIMITED[metric](rail) for metric, rail in rails if metric in _LIMITED
        }
        tallies = await self._ledger.tallies(name, epoch, limits)
        decision = await asyncio.to_thread(judged, route, tallies)
        if decision is not None and decision.verdict == "roll back":
            why = "; ".join(f"{f.name}: {f.why}" for f in decision.findings if f.verdict == "harm")
            await self._book.roll_back(SERVER, name, why, epoch)
        elif standing.state is State.HELD and not standing.waits:
            return
        elif moves and tallies.mismatch < MISMATCH:
            users = ", ".join(f"{arm} {tally.users}" for arm, tally in tallies.arms.items())
            why = f"arms do not have the users that their weights say (p {tallies.mismatch:.2g}): "
            await self._book.hold(name, why + users, epoch)
        elif route.ramp is not None and route.ramp.gated and decision is not None:
            await self._gate(standing, decision)
        elif standing.state is State.ACTIVE and self._due(standing):
            weights = await asyncio.to_thread(drawn, route, tallies, int(self._clock()))
            if weights:
                await self._book.reweight(name, epoch, weights)

    async def _gate(self, standing: Standing, decision: Decision) -> None:
        """An arm that nobody gets now does not keep its ramp waiting: it might for ever."""
        name, epoch = standing.route.name, standing.epoch
        idle = tuple(_of(a) for a, share in standing.shares(self._clock()).items() if not share)
        unknown = [
            f for f in decision.findings if f.verdict == "unknown" and not f.name.endswith(idle)
        ]
        if unknown and standing.state is State.ACTIVE:
            why = "; ".join(f"{f.name}: {f.why}" for f in unknown)
            await self._book.hold(name, WAITS + why, epoch)
        elif not unknown and standing.waits:
            await self._book.resume(name, epoch)

    def _due(self, standing: Standing) -> bool:
        bandit = standing.route.bandit
        since = standing.bandit_at or standing.epoch / 1000
        return bandit is not None and self._clock() - since >= bandit.interval


def judged(route: Route, tallies: Tallies) -> Decision | None:
    """Of every arm that answers but the control; None if there is nothing to judge."""
    control = tallies.arms.get(route.control, Tally())
    found: list[Rate | Loss] = []
    for arm in route.live:
        if arm == route.control:
            continue
        tally = tallies.arms.get(arm, Tally())
        for rail in route.guardrails.values():
            name = rail.metric.value + _of(arm)
            if rail.metric is Metric.REWARD:
                found.append(Loss(name, tally.rewards, control.rewards, rail.tolerated))
                continue
            met = tally.met.get(rail.metric.value, 0)
            versus = (control.met.get(rail.metric.value, 0), control.users)
            versus_control = versus if rail.versus_control else None
            found.append(Rate(name, met, tally.users, rail.tolerated, versus_control))
    return judge(found, LEVEL) if found else None


def _of(arm: str) -> str:
    return f" of arm {arm!r}"


def drawn(route: Route, tallies: Tallies, seed: int) -> Mapping[str, float]:
    """A bandit's weights; none while an arm has too few users with rewards."""
    bandit = route.bandit
    assert bandit is not None
    rewards = {arm: tallies.arms.get(arm, Tally()).rewards for arm in route.live}
    if any(sample.n < bandit.least_users for sample in rewards.values()):
        return {}
    if all(map(_binary, rewards.values())):
        counts = {arm: (round(s.mean * s.n), s.n) for arm, s in rewards.items()}
        return rate_shares(counts, seed, bandit.floor)
    return mean_shares(rewards, seed, bandit.floor)


def _binary(sample: Sample) -> bool:
    """Each value is 0 or 1: of values in [0, 1] no others have this variance."""
    spread = sample.mean * (1 - sample.mean) * sample.n / max(sample.n - 1, 1)
    return 0 <= sample.mean <= 1 and abs(sample.variance - spread) < 1e-9
