"""Routing: requests that name a route get an arm, and their trials go to the ledger."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from deltaserve.server.ledger.tally import Ledger
from deltaserve.server.ledger.trial import Trial
from deltaserve.server.metrics import Metrics
from deltaserve.server.routes.assign import Placement, place
from deltaserve.server.routes.book import RouteBook
from deltaserve.server.routes.refusals import refuses
from deltaserve.server.routes.route import Arm, Metric, Route
from deltaserve.server.service import convert
from deltaserve.server.service.call import Call
from deltaserve.server.service.routed import Asked, Routed, as_arm

log = logging.getLogger(__name__)

MOST_SLOW = 100
"""Answers that wait for patterns of routes' own; of more nobody looks whether they refuse."""


class Routing:
    """Belongs to one event loop. ledger: None keeps no trials."""

    def __init__(self, book: RouteBook, metrics: Metrics, ledger: Ledger | None = None) -> None:
        self._book = book
        self._ledger = ledger
        self._metrics = metrics
        prefix = "deltaserve-refusals"
        self._judges = ThreadPoolExecutor(1, thread_name_prefix=prefix)
        self._slow_judges = ThreadPoolExecutor(1, thread_name_prefix=f"{prefix}-own")
        self._judging: set[asyncio.Future[bool]] = set()
        self._slow = 0

    def of(self, request: Asked, call: Call) -> Routed[Asked]:
        """The request as its arm is to answer it; the request itself if it names no route."""
        self._check_parts(request, call)
        standing = self._book.find(request.model, call.caller) if request.model else None
        if standing is None or request.adapters or request.HasField("combination"):
            return Routed(request)
        convert.check_labels(request)
        tenant = call.caller.tenant
        placement = place(standing, tenant, request.user, time.time())
        return Routed(as_arm(request, placement.arm), placement, tenant, self._finish)

    def route(self, name: str, call: Call) -> Route | None:
        """The route of that name."""
        standing = self._book.find(name, call.caller) if name else None
        return None if standing is None else standing.route

    def beside(self, request: Asked, routed: Routed[Asked], arm: Arm, call: Call) -> Routed[Asked]:
        """The request as a shadow runs it, after it was answered as `routed`."""
        assert routed.placement is not None
        made = as_arm(request, arm)
        made.request_id = routed.request.request_id
        placement = replace(routed.placement, arm=arm, weights={})
        return Routed(made, placement, call.caller.tenant, self._finish)

    def shed(self, placement: Placement, arm: Arm) -> None:
        """A shadow was given up."""
        self._metrics.on_route(placement.standing.route.name, arm.name, "shed", 0.0)

    async def drain(self) -> None:
        """Wait until every trial is with the ledger."""
        while self._judging:
            await asyncio.wait(self._judging)

    def close(self) -> None:
        """End the thread."""
        self._judges.shutdown(wait=False, cancel_futures=True)
        self._slow_judges.shutdown(wait=False, cancel_futures=True)

    def _check_parts(self, request: Asked, call: Call) -> None:
        """A route stands alone, in `model`."""
        fields = [("adapters.name", a.name) for a in request.adapters]
        for i, member in enumerate(request.combination.members):
            path = f"combination.members[{i}]."
            fields += [(f"{path}model", member.model)]
            fields += [(f"{path}adapters.name", a.name) for a in member.adapters]
        for field, name in fields:
            if name and self._book.find(name, call.caller) is not None:
                convert.refuse(field, f"route {name!r}", "an adapter; a route is a `model` alone")

    def _finish(self, placement: Placement, trial: Trial, openings: list[str]) -> None:
        """Off the path of the tokens: patterns may take their time on a thread of their own; those
        that a route brings, which may be slow, on another than the default ones."""
        self._metrics.on_route(trial.route, trial.arm, trial.ended, trial.seconds)
        if self._ledger is None:
            return
        rail = placement.standing.route.guardrails.get(Metric.REFUSAL)
        patterns = () if rail is None else rail.refusals
        slow = bool(patterns)
        if slow and self._slow >= MOST_SLOW:
            log.warning("route=%s: refusals are not looked for, so slow are they", trial.route)
            self._ledger.record(trial)
            return
        self._slow += slow
        loop = asyncio.get_running_loop()
        judges = self._slow_judges if slow else self._judges
        future = loop.run_in_executor(judges, refuses, openings, patterns)
        self._judging.add(future)
        future.add_done_callback(lambda done: self._record(trial, done, slow=slow))

    def _record(self, trial: Trial, judged: asyncio.Future[bool], *, slow: bool) -> None:
        self._judging.discard(judged)
        self._slow -= slow
        assert self._ledger is not None
        refusal = not judged.cancelled() and judged.exception() is None and judged.result()
        self._ledger.record(replace(trial, refusal=refusal))
