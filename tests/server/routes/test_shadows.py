"""Shadows answer nobody, are measured, and give way to everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fake_engine import FakeEngine, failed
from served import Served, served

from deltaserve.clients import AsyncClient
from deltaserve.server.engine.core import Outbox, Output, Request
from deltaserve.server.errors import NonFiniteLogits
from deltaserve.server.ledger.trial import Ended, Trial
from deltaserve.server.service.shadows import MAX_SHADOWS, PRIORITY, TENANT

ARMS = [{"name": "base"}, {"name": "dark", "model": "a", "shadow": 1.0, "stop": {"max_tokens": 40}}]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


class Scene:
    def __init__(self, s: Served, client: AsyncClient) -> None:
        self.engine, self.client, self.server = s.engine, client, s.server
        self.trials: list[Trial] = []
        s.server.services.ledger.record = self.trials.append  # type: ignore[method-assign]
        self._value = s.metrics.registry.get_sample_value

    @property
    def shed(self) -> float:
        labels = {"route": "r", "arm": "dark", "ended": "shed"}
        return self._value("deltaserve_route_requests_total", labels) or 0.0

    async def ask(self, user: str = "u") -> None:
        answer = await self.client.generate("hi", "r", max_tokens=2, user=user, priority=7)
        assert answer.served_by.arm == "base" and not answer.served_by.adapters
        assert len(answer.token_ids) == 2


@asynccontextmanager
async def scene(engine: FakeEngine | None = None) -> AsyncIterator[Scene]:
    async with served(engine) as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        await client.put_route("r", ARMS)
        yield Scene(s, client)


async def test_a_shadow_is_measured_and_answers_nobody() -> None:
    async with scene() as s:
        await s.ask()
        await until(lambda: len(s.trials) == 2)
        live, shadow = s.trials
        first, second = s.engine.submitted
        assert (live.arm, live.shadow, live.user, live.ended) == ("base", False, "u", "answered")
        assert live.weights == {"base": 1.0} and live.completion_tokens == 2
        assert (shadow.arm, shadow.shadow, shadow.user) == ("dark", True, "u")
        assert (shadow.ended, shadow.completion_tokens) == (Ended.ANSWERED, 40)
        assert shadow.request_id == live.request_id and shadow.seconds > 0
        assert (first.priority, first.tenant) == (7, "u")
        assert (second.priority, second.tenant, second.max_wait) == (PRIORITY, TENANT, 1.0)
        assert PRIORITY < -1000 and [r.name for r in second.adapters] == ["a@digest-of-/a"]
        submit, running = s.engine.submit, []

        def noted(request: Request, outbox: Outbox) -> None:
            running.append(s.engine.in_flight)
            submit(request, outbox)

        s.engine.submit = noted  # type: ignore[method-assign]
        async for _ in s.client.stream("hi", "r", max_tokens=2, user="v"):
            pass
        await until(lambda: len(s.trials) == 4)
        assert running == [0, 0], "it begins when the answer has ended"


async def test_no_shadow_begins_while_somebody_waits_and_none_goes_on() -> None:
    async with scene(
        FakeEngine(step_seconds=0.1)
    ) as s:  # the shadow takes 4 s, unless it gives way
        s.engine.waiting = 1
        await s.ask()
        assert s.shed == 1 and len(s.engine.submitted) == 1
        s.engine.waiting = 0
        await s.ask()
        await until(lambda: len(s.engine.submitted) == 3)
        s.engine.waiting = 1
        await until(lambda: s.shed == 2)
        assert s.engine.cancelled == [s.engine.submitted[2].request_id]
        assert [t.shadow for t in s.trials] == [False, False], "what gave way says nothing"


async def test_few_run_at_once_and_a_drain_ends_them() -> None:
    async with scene(FakeEngine(step_seconds=0.05)) as s:
        await asyncio.gather(*(s.ask(f"u{i}") for i in range(MAX_SHADOWS + 3)))
        await until(lambda: s.shed == 3)
        assert s.engine.in_flight <= MAX_SHADOWS
        assert await s.server.drain(), "nobody waits for a shadow"
        await until(lambda: s.shed == MAX_SHADOWS + 3)


async def test_a_shadow_that_fails_is_its_own_arms_error() -> None:
    async with scene() as s:
        await s.ask()
        await until(lambda: len(s.trials) == 2)
        next_of = s.engine._next

        def broken(request: Request, done: int, since: float, cancelled: set[str]) -> Output:
            if request.tenant == TENANT and done:
                return failed(request, NonFiniteLogits("not a number"))
            return next_of(request, done, since, cancelled)

        s.engine._next = broken  # type: ignore[method-assign]
        await s.ask()
        await until(lambda: len(s.trials) == 4)
        assert [t.ended for t in s.trials[2:]] == [Ended.ANSWERED, Ended.ERROR]


async def test_users_outside_cast_none() -> None:
    async with scene() as s:
        await s.client.put_route("r", ARMS, coverage=1e-9)
        await s.ask()
        await s.client.roll_back_route("r")
        await s.ask()
        await until(lambda: len(s.trials) == 2)
        assert len(s.engine.submitted) == 2 and [t.user for t in s.trials] == ["", ""]
