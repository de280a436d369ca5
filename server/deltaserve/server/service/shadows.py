"""Shadows: arms that run a copy of a request after its answer, are measured, and answer nobody."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from deltaserve.server.engine.core import Request
from deltaserve.server.errors import DeadlineExceeded, Overloaded, ShuttingDown
from deltaserve.server.ledger.trial import Ended
from deltaserve.server.routes.assign import Assignment
from deltaserve.server.service import convert
from deltaserve.server.service.asked import Asked
from deltaserve.server.service.call import Call
from deltaserve.server.service.outbox import Stream
from deltaserve.server.service.routed import GONE, Routed
from deltaserve.server.service.routing import Routing
from deltaserve.v1 import generation_pb2

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine

log = logging.getLogger(__name__)

MAX_SHADOWS = 4
"""That run at once."""
PRIORITY = -convert.MAX_PRIORITY - 1
"""Below what any client can ask for."""
TENANT = "\0shadow"
"""A tenant that no client can be of."""
MAX_WAIT = 1.0
"""Seconds until its first token, far below those after which age alone moves a request forward."""
MAX_SECONDS = 120.0
LOOK_SECONDS = 0.02
"""Between two looks at whether somebody waits."""

Given = TypeVar("Given", generation_pb2.GenerateRequest, generation_pb2.GenerateStreamRequest)
Ask = Callable[[convert.GenerateRequest, Call], Awaitable[Asked]]
Submit = Callable[[list[Request], Call], AbstractAsyncContextManager[Stream]]
NOT_COPIED = (Assignment.OUTSIDE, Assignment.ROLLED_BACK)
SHED = (*GONE, Overloaded, ShuttingDown, DeadlineExceeded)


class Shadows:
    """A shadow begins after the answer that it is of has ended, while nobody waits, and is given up
    as soon as somebody does. Belongs to one event loop."""

    def __init__(self, engine: Engine, routing: Routing, ask: Ask, submit: Submit) -> None:
        self._engine = engine
        self._routing = routing
        self._ask = ask
        self._submit = submit
        self._running: set[asyncio.Task[None]] = set()
        self._unbegun = 0
        self._closed = False

    def cast(self, request: Given, routed: Routed[Given], call: Call) -> None:
        """Of a request that its arm has answered."""
        placement = routed.placement
        if placement is None or placement.assignment in NOT_COPIED:
            return
        for arm in placement.standing.route.arms.values():
            if not arm.shadow or random.random() >= arm.shadow:
                continue
            if self._closed or len(self._running) >= MAX_SHADOWS or self._somebody_waits():
                self._routing.shed(placement, arm)
                continue
            beside = self._routing.beside(request, routed, arm, call)
            task = asyncio.create_task(self._run(beside, call))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def close(self) -> None:
        """Give up all of them, and begin no more."""
        self._closed = True
        for task in self._running:
            task.cancel()

    async def _run(self, routed: Routed[Any], call: Call) -> None:
        look = asyncio.create_task(self._look(asyncio.current_task()))
        try:
            await self._measured(routed, call)
            routed.end(Ended.ANSWERED)
        except SHED:
            assert routed.placement is not None
            self._routing.shed(routed.placement, routed.placement.arm)
        except Exception as error:
            log.info("request=%s route=%s: %s", routed.request.request_id, routed.shown, error)
            routed.end(Ended.ERROR)
        finally:
            look.cancel()

    async def _measured(self, routed: Routed[Any], call: Call) -> None:
        asked = await self._ask(routed.request, replace(call, seconds=MAX_SECONDS))
        requests = [
            replace(r, priority=PRIORITY, tenant=TENANT, user="", max_wait=MAX_WAIT)
            for r in asked.requests
        ]
        unbegun = {r.request_id for r in requests}
        self._unbegun += len(unbegun)
        try:
            async with self._submit(requests, call) as stream:
                while not stream.done:
                    outputs = await stream.take()
                    begun = {o.request_id for o in outputs} & unbegun
                    unbegun -= begun
                    self._unbegun -= len(begun)
                    for output in routed.heard(outputs):
                        if output.error is not None:
                            raise output.error
        finally:
            self._unbegun -= len(unbegun)

    async def _look(self, shadow: asyncio.Task[None] | None) -> None:
        while shadow is not None:
            await asyncio.sleep(LOOK_SECONDS)
            if self._somebody_waits():
                shadow.cancel()
                return

    def _somebody_waits(self) -> bool:
        return self._engine.stats().waiting > self._unbegun
