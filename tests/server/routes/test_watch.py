"""What a route does of itself: by outcomes that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeAdapters

from deltaserve.clients import route_messages
from deltaserve.server.errors import Changed
from deltaserve.server.experiments.samples import Sample
from deltaserve.server.ledger.tally import Tallies, Tally
from deltaserve.server.ledger.trial import Trial
from deltaserve.server.routes.book import SERVER, RouteBook
from deltaserve.server.routes.route import Standing, State
from deltaserve.server.routes.watch import Watch

ARMS = [{"name": "base"}, {"name": "tuned", "model": "a"}]
NOBODY = Sample(0, 0.0, 0.0)


class Scene:
    """A book and a watch with a clock and a ledger of the test's own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.told: dict[str, Tally] = {}
        self.mismatch = 1.0
        self.asked: list[Mapping[str, float] | None] = []
        adapters = FakeAdapters()
        adapters.load("a", "/a").result(5)
        self.book = RouteBook(adapters, ("fake-base",), clock=lambda: self.now)
        self.watch = Watch(self.book, self, lambda: self.now)

    def record(self, trial: Trial) -> None:
        raise AssertionError("nobody asks")

    async def tallies(
        self, route: str, epoch: int, limits: Mapping[str, float] | None = None
    ) -> Tallies:
        self.asked.append(limits)
        known = self.book.get(route)
        return Tallies(self.told, self.mismatch) if epoch == known.epoch else Tallies()

    async def put(self, **options: Any) -> Standing:
        return await self.book.put(SERVER, route_messages.put("r", ARMS, options).route)

    async def after(self, seconds: float = 5.0) -> Standing:
        self.now += seconds
        await self.watch.look()
        return self.book.get("r")


def tally(users: int, metric: str = "", met: int = 0, rewards: Sample = NOBODY) -> Tally:
    return Tally(users, {metric: met}, rewards)


METRICS = ["error", "slow", "slow_first_token", "refusal", "empty", "long", "negative_feedback"]
MORE = {"slow": {"seconds": 2.0}, "slow_first_token": {"seconds": 0.5}, "long": {"tokens": 100}}


@pytest.mark.parametrize("versus", [False, True])
@pytest.mark.parametrize("metric", METRICS)
async def test_each_metric_rolls_back(metric: str, versus: bool) -> None:
    """Harm of the treatment does; as much of the control alone, or too few users, does not."""
    scene = Scene()
    rail = {"metric": metric, "tolerated": 0.05, "versus_control": versus, **MORE.get(metric, {})}
    await scene.put(guardrails=[rail])
    for control, treatment in ((400, 20), (20, 20), (20, 60)):
        scene.told = {"base": tally(1000, metric, control), "tuned": tally(1000, metric, treatment)}
        assert (await scene.after()).state is State.ACTIVE
    scene.told = {"base": tally(5, metric, 0), "tuned": tally(1, metric, 1)}
    assert (await scene.after()).state is State.ACTIVE, "too few"
    scene.told = {"base": tally(1000, metric, 20), "tuned": tally(1000, metric, 200)}
    found = await scene.after()
    assert found.state is State.ROLLED_BACK and found.shares(scene.now)["tuned"] == 0
    assert found.reason.startswith(f"{metric} of arm 'tuned': ")
    assert "in [0." in found.reason and "all above the tolerated 0.05" in found.reason
    limits = MORE.get(metric, {})
    assert scene.asked[-1] == ({metric: next(iter(limits.values()))} if limits else {})
    again = await scene.put(guardrails=[rail])
    assert again.state is State.ACTIVE and again.epoch > found.epoch
    scene.told = {}
    assert (await scene.after()).state is State.ACTIVE, "what was counted before is past"


async def test_a_loss_of_reward_rolls_back() -> None:
    scene = Scene()
    await scene.put(guardrails=[{"metric": "reward", "tolerated": 0.1}])
    good = tally(2000, rewards=Sample(2000, 0.8, 0.04))
    scene.told = {"base": good, "tuned": tally(2000, rewards=Sample(2000, 0.75, 0.04))}
    assert (await scene.after()).state is State.ACTIVE
    scene.told = {"base": good, "tuned": tally(2000, rewards=Sample(2000, 0.6, 0.04))}
    found = await scene.after()
    assert found.state is State.ROLLED_BACK and "loss against the control" in found.reason


POINTS = [
    {"after": 0, "weights": {"base": 1, "tuned": 0}},
    {"after": 100, "weights": {"base": 0, "tuned": 1}},
]


async def test_a_mismatch_holds_what_moves() -> None:
    scene = Scene()
    scene.mismatch = 1e-4
    scene.told = {"base": tally(50), "tuned": tally(90)}
    await scene.put()
    assert (await scene.after()).state is State.ACTIVE, "nothing moves"
    await scene.put(ramp={"points": POINTS, "shape": "linear"})
    scene.now += 25
    found = await scene.after()
    assert found.state is State.HELD and "p 0.0001" in found.reason and "tuned 90" in found.reason
    assert found.shares(scene.now + 50) == pytest.approx({"base": 0.7, "tuned": 0.3})
    assert (await scene.after()) == found, "it is held once"
    scene.mismatch = 1.0
    assert (await scene.after()).state is State.HELD
    put = await scene.put(ramp={"points": POINTS, "shape": "linear"})
    assert put.state is State.ACTIVE and put.epoch > found.epoch


async def test_a_gated_ramp_waits_until_it_is_safe() -> None:
    scene = Scene()
    rail = {"metric": "error", "tolerated": 0.1}
    await scene.put(ramp={"points": POINTS, "shape": "linear", "gated": True}, guardrails=[rail])
    scene.now += 15
    scene.told = {"base": tally(100), "tuned": tally(10)}
    found = await scene.after()
    assert found.waits and "unknown" not in found.reason and "error of arm" in found.reason
    assert found.shares(scene.now) == pytest.approx({"base": 0.8, "tuned": 0.2})
    assert (await scene.after(1000)).shares(scene.now)["tuned"] == pytest.approx(0.2)
    scene.told = {"base": tally(900), "tuned": tally(900, "error", 20)}
    found = await scene.after()
    assert found.state is State.ACTIVE and not found.reason
    assert found.shares(scene.now)["tuned"] == pytest.approx(0.2)
    assert found.shares(scene.now + 30)["tuned"] == pytest.approx(0.5)
    scene.told = {"base": tally(900), "tuned": tally(9, "error", 0)}
    assert (await scene.after()).waits
    scene.told = {"base": tally(900), "tuned": tally(900, "error", 400)}
    assert (await scene.after()).state is State.ROLLED_BACK


async def test_a_gated_ramp_does_not_wait_for_an_arm_that_nobody_gets() -> None:
    scene = Scene()
    rail = {"metric": "error", "tolerated": 0.1, "versus_control": True}
    await scene.put(ramp={"points": POINTS, "shape": "step", "gated": True}, guardrails=[rail])
    scene.told = {"base": tally(900)}
    assert (await scene.after(50)).state is State.ACTIVE
    found = await scene.after(50)
    assert found.waits and found.shares(scene.now) == {"base": 0, "tuned": 1}


async def test_a_bandit_moves_its_weights_at_intervals() -> None:
    scene = Scene()
    await scene.put(bandit={"interval": 60, "floor": 0.1, "least_users": 30})
    rng = np.random.default_rng(0)
    made = {arm: (rng.random(40) < p).astype(float) for arm, p in (("base", 0.2), ("tuned", 0.9))}
    rewards = {arm: Sample(40, v.mean(), v.var(ddof=1)) for arm, v in made.items()}
    scene.told = {arm: tally(50, rewards=sample) for arm, sample in rewards.items()}
    assert (await scene.after()).shares(scene.now) == {"base": 0.5, "tuned": 0.5}, "not yet"
    found = await scene.after(60)
    assert found.shares(scene.now) == pytest.approx({"base": 0.1, "tuned": 0.9})
    assert found.bandit_at == scene.now and found.epoch == int(1000.0 * 1000)
    scene.told = dict(zip(scene.told, reversed(scene.told.values()), strict=True))
    assert (await scene.after(30)).shares(scene.now)["tuned"] == pytest.approx(0.9), "frozen"
    real = {"base": Sample(40, 3.0, 1.0), "tuned": Sample(40, -1.0, 2.0)}
    scene.told = {arm: tally(50, rewards=sample) for arm, sample in real.items()}
    found = await scene.after(30)
    assert found.shares(scene.now) == pytest.approx({"base": 0.9, "tuned": 0.1})
    same = await scene.put(bandit={"interval": 90, "floor": 0.1, "least_users": 30})
    assert same.weights == found.weights and same.epoch == found.epoch
    scene.told["tuned"] = tally(50, rewards=Sample(29, 9.0, 1.0))
    assert (await scene.after(100)).weights == found.weights, "too few users"


async def test_a_finding_about_another_epoch_changes_nothing() -> None:
    scene = Scene()
    first = await scene.put()
    scene.now += 1
    await scene.book.roll_back(SERVER, "r", "")
    second = await scene.put()
    for change in (
        scene.book.roll_back(SERVER, "r", "old", first.epoch),
        scene.book.hold("r", "old", first.epoch),
    ):
        assert (await change).state is State.ACTIVE
    await scene.book.reweight("r", first.epoch, {"base": 1.0, "tuned": 0.0})
    assert scene.book.get("r") == second
    with pytest.raises(Changed):
        await scene.put(etag=first.etag)
