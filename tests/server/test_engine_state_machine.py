"""Whatever comes in whatever order, nothing is lost: scheduler, cache blocks and adapters together.

The real engine, turned by hand, over a model that chooses tokens by counting, loader threads that
work when they are told to, and a clock that stands still until it is moved.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.options import LoadOptions
from deltaserve.server.engine import adapter_cache, loader, residency, residents
from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.backlog import Backlog
from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.core import (
    AdapterRef,
    Combination,
    FinishReason,
    Member,
    Output,
    Request,
    SamplingParams,
)
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.kv_cache import BlockManager
from deltaserve.server.engine.kv_memory import BlockMemory
from deltaserve.server.engine.make import MakeHere
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.observer import NullObserver
from deltaserve.server.engine.runner import LogitRow, StepResult
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.errors import AdapterBusy, RequestError

CLOCKS = ("monotonic", "time", "perf_counter")
VOCABULARY = 64
BLOCK = 2
BLOCK_BYTES = 10
LONGEST = 24
NAMES = ["a", "b", "c", "d"]
SIZES = {"a": 40, "b": 60, "c": 90, "d": 100}


@dataclass
class Packed:
    digest: str
    nbytes: int
    prefix: None = None

    @property
    def memory(self) -> Mapping[Any, int]:
        return {self.digest: self.nbytes}


class Model:
    """The host of adapters, too. slots: what is installed where."""

    eos_token_ids = ()
    vocab_size = VOCABULARY
    max_length = LONGEST

    def __init__(self) -> None:
        self.slots: dict[int, str] = {}

    def composable(self, weighted: object) -> str | None:
        return None

    def prepare(self, adapter: Adapter) -> Packed:
        return Packed(adapter.digest, adapter.source_bytes)

    def only(self, prepared: Packed, modules: object) -> Packed:
        return prepared

    def install(self, slot: int, prepared: Packed) -> None:
        assert slot not in self.slots
        self.slots[slot] = prepared.digest

    def remove(self, slot: int) -> None:
        del self.slots[slot]


class Runner:
    """Remembers which token is in which cell, as a model would its keys and values, and reads the
    prompt and answer back from there: the next token is a hash of all of them and the adapters.
    """

    def __init__(self, model: Model, tick: Callable[[float], None]) -> None:
        self.model = model
        self.tick = tick
        self.cells: dict[tuple[int, int], tuple[int, tuple[str, ...]]] = {}
        self.fails = False

    def run(self, batch: Batch) -> StepResult:
        self.tick(0.01)
        if self.fails:
            self.fails = False
            raise RuntimeError("the step fails")
        parts = sorted(batch.parts, key=lambda p: (p.sequence.arrival, p.start))
        for part in parts:
            s, digests = part.sequence, self._digests(part.sequence.slots)
            assert digests == tuple(a.digest for a in s.adapters), "the adapters are in memory"
            for i in range(part.start, part.start + part.count):
                self.cells[s.blocks[i // BLOCK], i % BLOCK] = s.tokens[i], digests
        rows = [LogitRow(p, p.start + p.count - 1) for p in batch.parts if p.sample]
        logits = torch.zeros(len(rows), VOCABULARY)
        for row, logit in zip(rows, logits, strict=True):
            s = row.part.sequence
            held = [self.cells[s.blocks[i // BLOCK], i % BLOCK] for i in range(row.position + 1)]
            logit[choose([t for t, _ in held], {d for _, d in held})] = 1.0
        return StepResult(rows, logits)

    def works(self) -> bool:
        return True

    def scrub(self, blocks: list[int]) -> None:
        for block in blocks:
            for i in range(BLOCK):
                self.cells.pop((block, i), None)

    def _digests(self, slots: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self.model.slots[slot] for slot in slots)


def choose(tokens: list[int], digests: set[tuple[str, ...]]) -> int:
    """The token behind these; all of them must have been computed with the same adapters."""
    assert len(digests) == 1, "keys and values of other adapters"
    salt = sum(map(ord, "".join(next(iter(digests)))))
    return (sum((i + 1) * t for i, t in enumerate(tokens)) + salt) % VOCABULARY


class Workers:
    """Do a job when told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def submit(self, urgency: int, job: Callable[[], None]) -> None:
        heapq.heappush(self.jobs, (urgency, next(self._numbers), job))

    def work(self) -> None:
        heapq.heappop(self.jobs)[2]()

    def close(self) -> None:
        self.jobs.clear()


class Outbox:
    def __init__(self) -> None:
        self.outputs: dict[str, list[Output]] = {}

    def deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            held = self.outputs.setdefault(output.request_id, [])
            assert not held or held[-1].finish_reason is None, "an output behind the last"
            held.append(output)

    def done(self, request_id: str) -> bool:
        held = self.outputs.get(request_id)
        return bool(held) and held[-1].finish_reason is not None


times = st.sampled_from([0.01, 0.3, 1.5, 6.0])
seldom = st.one_of(*[st.none()] * 5, times)
adapters = st.lists(st.sampled_from(NAMES[:3]), max_size=1) | st.lists(
    st.sampled_from(NAMES), max_size=2, unique=True
)
requests = st.fixed_dictionaries(
    {
        "names": adapters,
        "tenant": st.sampled_from(["", "t"]),
        "prompt": st.lists(st.integers(0, 3), min_size=3, max_size=12),
        "answer": st.sampled_from([1, 7, 9, 10]),
        "priority": st.integers(-1, 1),
        "deadline": seldom,
        "max_wait": seldom,
        "other": st.one_of(*[st.none()] * 3, adapters),
    }
)
REACHED: Counter[str] = Counter()
"""What happened in the runs, so that it is seen that they come to it."""


class World(RuleBasedStateMachine):
    asked = Bundle("asked")

    @initialize(
        blocks=st.integers(13, 17),
        budget=st.integers(120, 300),
        sequences=st.integers(2, 5),
        tokens=st.integers(2, 20),
        queue=st.integers(3, 12),
        prefix_cache=st.booleans(),
    )
    def build(
        self,
        blocks: int,
        budget: int,
        sequences: int,
        tokens: int,
        queue: int,
        prefix_cache: bool,
    ) -> None:
        self.now = 100.0
        now = SimpleNamespace(**dict.fromkeys(CLOCKS, lambda: self.now))
        modules = (adapter_cache, loader, residents, residency)
        self.patches = [mock.patch.object(module, "time", now) for module in modules]
        for patch in self.patches:
            patch.start()
        floor = -(-LONGEST // BLOCK) * BLOCK_BYTES + BLOCK_BYTES
        ledger = Ledger(floor + budget, kv_floor=floor)
        memory = BlockMemory(ledger, 1, BLOCK_BYTES)
        manager = BlockManager(blocks, BLOCK, prefix_cache=prefix_cache, memory=memory)
        self.model = Model()
        self.runner = Runner(self.model, self.wait)
        self.damaged: set[str] = set()
        make = MakeHere(lambda *what: self.read(*what), self.model)
        self.woken = False
        self.cache = AdapterCache(
            self.model, make, ledger=ledger, wake=self._wake, observer=NullObserver()
        )
        self.workers = Workers()
        self.cache._loader._workers = self.workers  # type: ignore[assignment]
        self.cache._residents._discard = lambda prepared: None
        self.engine = Engine(
            self.model,  # type: ignore[arg-type]
            self.runner,  # type: ignore[arg-type]
            Scheduler(manager, tokens, sequences),
            self.cache,
            NullObserver(),
            SimpleNamespace(held_fingerprint="base"),  # type: ignore[arg-type]
            tokenizer=None,
            backlog=Backlog(queue, max(1, queue // 3)),
            clock=lambda: self.now,
        )
        self.outbox = Outbox()
        self.count = 0
        self.requests: dict[str, Request] = {}
        self.futures: list[Future[Any]] = []
        for name in NAMES:
            self.load(name, False)
        while self.workers.jobs:
            self.workers.work()
            self.engine.step()

    def read(self, uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        name = uri[1:]
        if name in self.damaged:
            raise InvalidAdapter(f"{uri} is damaged")
        return Adapter(f"digest-{name}", "fake", {}, source_bytes=SIZES[name])

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def load(self, name: str, pinned: bool) -> None:
        with contextlib.suppress(AdapterBusy):
            self.futures.append(self.cache.load(name, f"/{name}", pinned=pinned))

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str) -> None:
        with contextlib.suppress(AdapterBusy):
            self.futures.append(self.cache.load(name, f"/{name}", register_only=True))

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        with contextlib.suppress(RequestError):
            self.futures.append(self.cache.unload(name))

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        with contextlib.suppress(RequestError):
            self.cache.pin(name, pinned)

    @rule(name=st.sampled_from(NAMES))
    def damage(self, name: str) -> None:
        self.damaged ^= {name}

    @precondition(lambda self: self.workers.jobs)
    @rule()
    def finish_a_load(self) -> None:
        self.workers.work()

    @rule(target=asked, wanted=st.lists(requests, min_size=2, max_size=6))
    def submit(self, wanted: list[dict[str, Any]]) -> Any:
        taken = []
        for asked in wanted:
            request = self._request(**asked)
            try:
                self.engine.submit(request, self.outbox)
            except RequestError as error:
                REACHED[getattr(error, "reason", "refused")] += 1
                continue
            self.requests[request.request_id] = request
            taken.append(request.request_id)
        return multiple(*taken)

    def _request(
        self,
        names: list[str],
        tenant: str,
        prompt: list[int],
        answer: int,
        priority: int,
        deadline: float | None,
        max_wait: float | None,
        other: list[str] | None,
    ) -> Request:
        refs = tuple(AdapterRef(n) for n in names)
        combination = None
        if other is not None:
            members = (Member(refs), Member(tuple(AdapterRef(n) for n in other)))
            refs, combination = (), Combination(members)
        self.count += 1
        return Request(
            f"r{self.count}",
            tuple(prompt),
            SamplingParams(max_tokens=answer, ignore_eos=True),
            refs,
            priority=priority,
            deadline=None if deadline is None else self.now + deadline,
            tenant=tenant,
            max_wait=max_wait,
            combination=combination,
        )

    @rule(request_id=asked)
    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)

    @rule(times=st.integers(1, 6))
    def turn(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @rule(seconds=times)
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule()
    def fail_a_step(self) -> None:
        """The next one that computes something."""
        self.runner.fails = True

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            known = self.engine._known
            done = {i for i in self.requests if self.outbox.done(i)}
            assert set(self.requests) - done == set(known)
            gone = {s.id for s in self.engine._turned_away}
            fresh = {i for i, s in known.items() if not s.started} - gone
            assert {s.id for s in self.engine._intake._backlog} == fresh
            installed = {r.slot for r in self.cache._registry.all() if r.ready}
            installed |= {v.slot for r in self.cache._registry.all() for v in r.views.values()}
            assert set(self.model.slots) == installed

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self._end()
        finally:
            for patch in self.patches:
                patch.stop()

    def _wake(self) -> None:
        self.woken = True

    def _end(self) -> None:
        """Everything ends by itself, soon, and rightly."""
        self.damaged.clear()
        open_ = [self.requests[i] for i in self.requests if not self.outbox.done(i)]
        work = sum(2 * (len(r.prompt_ids) + r.sampling.max_tokens) for r in open_)
        steps, most = 0, (work + 60) * (len(open_) + 2)
        while self.engine._known or self.workers.jobs or self.cache._loader.arrived or self.woken:
            self.woken = False
            steps += 1
            assert steps < most, f"{self.engine._known} after {most} steps"
            if self.workers.jobs:
                self.workers.work()
            self.engine.step()
            self.now += 0.05
            self._unpin_if_stuck(steps)
        self.engine.step()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert all(a.in_flight == 0 for a in self.cache.list())
        assert all(f.done() for f in self.futures)
        REACHED["preempted"] += stats.preemptions
        REACHED["evicted"] += stats.adapter_evictions
        for request_id, request in self.requests.items():
            self._check(request, self.outbox.outputs[request_id])

    def _unpin_if_stuck(self, steps: int) -> None:
        """What is pinned may leave no room for what is only waiting to be published."""
        if steps % 50 == 0:
            for name in NAMES:
                with contextlib.suppress(RequestError):
                    self.cache.pin(name, False)

    def _check(self, request: Request, outputs: list[Output]) -> None:
        last = outputs[-1]
        tokens = [t for o in outputs for t in o.token_ids]
        if last.finish_reason is FinishReason.LENGTH:
            assert len(tokens) == request.sampling.max_tokens
            REACHED["combined" if request.combination else "answered"] += 1
        else:
            assert last.error is not None
            REACHED[getattr(last.error, "reason", type(last.error).__name__)] += 1
        if request.combination is None:
            digests = {tuple(f"digest-{ref.name}" for ref in request.adapters)}
            so_far = list(request.prompt_ids)
            for token in tokens:
                assert token == choose(so_far, digests)
                so_far.append(token)


def test_whatever_comes_nothing_is_lost() -> None:
    run_state_machine_as_test(
        World, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )


def any_request(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.choice([0, 1, 1, 1, 2]))
    return {
        "names": names,
        "tenant": rng.choice(["", "", "t"]),
        "prompt": [rng.randrange(4) for _ in range(rng.randint(1, 12))],
        "answer": rng.randint(1, 10),
        "priority": rng.randint(-1, 1),
        "deadline": rng.choice([None] * 9 + [0.3, 6.0]),
        "max_wait": rng.choice([None] * 9 + [0.01, 1.5]),
        "other": rng.choice([None, None, None, ["a"], []]),
    }


def test_long_lives() -> None:
    """The same with many requests at once, and it is seen that everything happens."""
    REACHED.clear()
    for seed in range(12):
        rng = random.Random(seed)
        world = World()
        world.build(
            blocks=rng.randint(13, 20),
            budget=rng.randint(120, 300),
            sequences=rng.randint(2, 5),
            tokens=rng.randint(2, 20),
            queue=rng.randint(8, 30),
            prefix_cache=rng.random() < 0.5,
        )
        for _ in range(250):
            live(world, rng)
            world.nothing_is_lost()
        world.teardown()
    assert all(REACHED[what] for what in OFTEN), REACHED


def live(world: World, rng: random.Random) -> None:
    """One thing happens."""
    name, dice = rng.choice(NAMES), rng.random()
    if dice < 0.35:
        world.submit([any_request(rng) for _ in range(rng.randint(1, 4))])
    elif dice < 0.75:
        world.turn(rng.randint(1, 6))
    elif dice < 0.80 and world.workers.jobs:
        world.finish_a_load()
    elif dice < 0.84 and world.requests:
        world.cancel(rng.choice(list(world.requests)))
    elif dice < 0.88:
        world.load(name, rng.random() < 0.05)
    elif dice < 0.90:
        world.unload(name)
    elif dice < 0.92:
        world.pin(name, rng.random() < 0.3)
    elif dice < 0.94:
        world.damaged = {name} - world.damaged
    elif dice < 0.95:
        world.fail_a_step()
    else:
        world.wait(rng.choice([0.01, 0.3, 1.5, 6.0]))


OFTEN = ["answered", "combined", "preempted", "evicted", "queue_full", "flow_full", "displaced"]
OFTEN += ["Cancelled", "DeadlineExceeded", "EngineFailure", "AdapterUnavailable", "max_wait"]
