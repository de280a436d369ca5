"""Adapters and requests come and go; every answer is the one that the request gets alone.

One base, several LoRAs of random content. The answers that everything is compared with are
computed once, each request by itself, in an engine with room for all (and `test_equivalence`
compares those with transformers + PEFT).
"""

from __future__ import annotations

import gc
import itertools
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from rig import load_base, request, running
from serving import until
from variants import VARIANTS, make_base

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.options import LoadOptions
from deltaserve.server.engine.collector import Answer, Collector, generate
from deltaserve.server.engine.core import AdapterState, FinishReason, Output, Request
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.make import MakeHere
from deltaserve.server.errors import (
    AdapterConflict,
    AdapterTooLarge,
    AdapterUnavailable,
    AdapterUnknown,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    Overloaded,
    ShuttingDown,
)
from deltaserve.server.model import BaseModel
from deltaserve.server.packing.prepared import PreparedAdapter

ADAPTERS = [f"a{i}" for i in range(12)]
TOLERANCE = 1e-4
_salts = itertools.count()


@dataclass
class Files:
    base: Path
    roots: Path

    def uri(self, name: str) -> str:
        return str(self.roots / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    found = Files(tmp_path_factory.mktemp("lifecycle") / "base", tmp_path_factory.mktemp("roots"))
    make_base(found.base, "llama")
    kinds = ("lora", "lora-r11", "dora")
    for i, name in enumerate(ADAPTERS):
        generator = torch.Generator().manual_seed(100 + i)
        VARIANTS[kinds[i % 3]].make(found.base, found.roots / name, generator)
    return found


@pytest.fixture(scope="module")
def model(files: Files) -> BaseModel:
    return load_base(files.base)


@pytest.fixture
def fresh(files: Files) -> Callable[..., object]:
    """An engine of the test's own."""
    return lambda **config: running(load_base(files.base), [files.roots], **config)


@pytest.fixture(scope="module")
def engine(files: Files, model: BaseModel) -> Iterator[Engine]:
    """Room for everything; `a0` to `a3` are loaded."""
    with running(model, [files.roots], max_batch_tokens=256) as made:
        for name in ADAPTERS[:4]:
            made.adapters.load(name, files.uri(name)).result(60)
        yield made


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        check_empty(request.getfixturevalue("engine"))


def check_empty(engine: Engine) -> None:
    until(lambda: engine.stats().kv_blocks_used == 0, "the blocks come back")
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert all(a.in_flight == 0 for a in engine.adapters.list())
    engine.check_integrity()


def prompt(seed: int, length: int = 20) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def alone(engine: Engine, asked: Request) -> Answer:
    """By itself, with nothing cached for it."""
    again = replace(asked, request_id=f"alone-{asked.request_id}", salt=f"alone{next(_salts)}")
    return generate(engine, [again], 60)[0]


def same(a: Answer, b: Answer, what: object = "") -> None:
    assert a.token_ids == b.token_ids, what
    assert a.last.finish_reason == b.last.finish_reason and a.text == b.text
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        assert x.logprob == pytest.approx(y.logprob, abs=TOLERANCE), what


def hold_reads(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, list[str]]:
    """Reads of adapters wait for the event; the list is of the threads that made them."""
    gate, threads = threading.Event(), []
    make = engine.adapters._loader._make
    assert isinstance(make, MakeHere)
    read = make._read

    def held(uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        threads.append(threading.current_thread().name)
        assert gate.wait(30)
        return read(uri, options, parent)

    monkeypatch.setattr(make, "_read", held)
    return gate, threads


# Loads:


def test_loads_and_unloads_under_requests(files: Files, engine: Engine) -> None:
    """Each adapter comes and goes over and over while others are asked."""
    asked = [request(prompt(i, 10 + i), ADAPTERS[i % 4] if i % 3 else "") for i in range(12)]
    right = [alone(engine, r) for r in asked]
    before = engine.adapters.used_bytes
    stop = threading.Event()
    rounds = []

    def churn(name: str) -> None:
        while not stop.is_set():
            size = engine.adapters.load(name, files.uri(name)).result(60).resident_bytes
            assert engine.adapters.unload(name).result(60) == size > 0
            rounds.append(name)

    threads = [threading.Thread(target=churn, args=(n,), daemon=True) for n in ADAPTERS[4:7]]
    for t in threads:
        t.start()
    while len(rounds) < 12:
        again = [
            replace(r, request_id=f"churn{next(_salts)}", salt=f"{len(rounds)}") for r in asked
        ]
        for ours, theirs in zip(generate(engine, again, 60), right, strict=True):
            same(ours, theirs)
    stop.set()
    for t in threads:
        t.join(60)
    assert engine.adapters.used_bytes == before


def test_a_load_never_runs_on_the_engine_thread(
    files: Files, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(prompt(1), "a0", max_tokens=40)
    right = alone(engine, asked)
    gate, threads = hold_reads(engine, monkeypatch)
    future = engine.adapters.load("a8", files.uri("a8"))
    until(lambda: bool(threads), "the reader has begun")
    steps = engine.stats().steps
    same(generate(engine, [asked], 20)[0], right)
    assert engine.stats().steps > steps + 20 and not future.done()
    gate.set()
    assert future.result(30).state is AdapterState.READY
    assert all("loader" in name for name in threads) and engine._thread.name not in threads
    engine.adapters.unload("a8").result(30)


def test_a_request_waits_for_its_adapter_while_others_go_on(
    files: Files,
    engine: Engine,
    fresh: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [request(prompt(i), f"a{i}") for i in (0, 1)]
    right = [alone(engine, r) for r in asked]
    size = max(engine.adapters.get(f"a{i}").resident_bytes for i in (0, 1))
    with fresh(adapter_bytes=int(size * 1.5)) as small:  # type: ignore[attr-defined]
        for name in ("a0", "a1"):
            small.adapters.load(name, files.uri(name)).result(60)
        assert small.adapters.get("a0").state is AdapterState.REGISTERED
        gate, threads = hold_reads(small, monkeypatch)
        collector = Collector()
        small.submit(asked[0], collector)
        until(lambda: bool(threads), "its load has begun")
        assert small.adapters.get("a0").state is AdapterState.LOADING
        same(generate(small, [asked[1]], 20)[0], right[1])
        assert generate(small, [request(prompt(3))], 20)[0].last.finish_reason == "length"
        assert small.stats().waiting == 1
        gate.set()
        answer = collector.wait(asked[0].request_id, 30)
        same(answer, right[0])
        assert answer.last.timings is not None and answer.last.timings.adapter_load > 0
        check_empty(small)


def test_many_adapters_in_little_memory(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    """Twelve adapters, room for about three, random requests, mixes among them."""
    dice = random.Random(7)
    asked = []
    for i in range(60):
        names = dice.choice([[], *([n] for n in ADAPTERS), dice.sample(ADAPTERS, 2)])
        mix = [(n, dice.choice([1.0, 0.5])) for n in names]
        asked.append(request(prompt(i, dice.randint(3, 40)), mix, max_tokens=dice.randint(1, 8)))
    for name in ADAPTERS[4:]:
        engine.adapters.load(name, files.uri(name)).result(60)
    right = [alone(engine, r) for r in asked]
    largest = max(a.resident_bytes for a in engine.adapters.list())
    for name in ADAPTERS[4:]:
        engine.adapters.unload(name).result(60)
    budget = 3 * largest
    with fresh(adapter_bytes=budget) as small:  # type: ignore[attr-defined]
        seen = []
        small.adapters.subscribe(lambda info: seen.append(small.adapters.used_bytes))
        for name in ADAPTERS:
            small.adapters.load(name, files.uri(name)).result(60)
        collector = Collector()
        for i, r in enumerate(asked):
            small.submit(r, collector)
            if i % 10 == 9:
                time.sleep(0.02)
        for r, theirs in zip(asked, right, strict=True):
            same(collector.wait(r.request_id, 120), theirs, r.adapters)
        assert max(seen) <= budget and small.adapters.evictions > 12
        check_empty(small)
        for name in ADAPTERS:
            small.adapters.unload(name).result(60)
        assert small.adapters.used_bytes == 0 and not small.adapters.list()


def test_a_flood_for_one_adapter_does_not_starve_another(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    """Room for one. Requests for it overlap without end; one for the other still gets its turn."""
    right = alone(engine, request(prompt(4), "a0"))
    size = max(engine.adapters.get(f"a{i}").resident_bytes for i in (0, 1))
    with fresh(adapter_bytes=int(size * 1.5)) as small:  # type: ignore[attr-defined]
        for name in ("a0", "a1"):
            small.adapters.load(name, files.uri(name)).result(60)
        stop = threading.Event()
        flood, others = Collector(), []

        def pour() -> None:
            while not stop.is_set():
                if small.stats().running + small.stats().waiting < 6:
                    others.append(request(prompt(len(others)), "a1", max_tokens=60))
                    small.submit(others[-1], flood)
                time.sleep(0.002)

        thread = threading.Thread(target=pour, daemon=True)
        thread.start()
        try:
            until(lambda: small.stats().running > 3, "the flood runs")
            collector, asked = Collector(), request(prompt(4), "a0")
            small.submit(asked, collector)
            same(collector.wait(asked.request_id, 20), right)
        finally:
            stop.set()
            thread.join()
        for r in others:
            flood.wait(r.request_id, 60)
        check_empty(small)


def test_unload_of_an_evicted_adapter_that_a_request_waits_for(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    """It comes back for the request and then goes for good."""
    asked = request(prompt(4), "a0")
    right = alone(engine, asked)
    size = max(engine.adapters.get(f"a{i}").resident_bytes for i in (0, 1))
    with fresh(adapter_bytes=int(size * 1.5)) as small:  # type: ignore[attr-defined]
        for name in ("a0", "a1"):
            small.adapters.load(name, files.uri(name)).result(60)
        collector = Collector()
        long = request(prompt(5), "a1", max_tokens=300)
        small.submit(long, collector)
        until(lambda: small.stats().running == 1, "a1 runs, so there is no room for a0")
        small.submit(asked, collector)
        freed = small.adapters.unload("a0")
        with pytest.raises(AdapterUnknown, match="being unloaded"):
            small.submit(request(prompt(4), "a0"), collector)
        same(collector.wait(asked.request_id, 60), right)
        assert freed.result(30) > 0
        collector.wait(long.request_id, 60)
        check_empty(small)


def test_an_unload_behind_a_request_of_one_step(files: Files, engine: Engine) -> None:
    """The step in which the request comes and goes is the last: nothing else wakes the engine."""
    for i in range(20):
        engine.adapters.load("a9", files.uri("a9")).result(60)
        collector = Collector()
        asked = request(prompt(i, 3), "a9", max_tokens=1)
        with engine._lock:  # the engine finds both when it wakes
            engine.submit(asked, collector)
            freed = engine.adapters.unload("a9")
        collector.wait(asked.request_id, 10)
        assert freed.result(10) > 0


@pytest.mark.parametrize("kind", VARIANTS)
def test_an_unload_frees_every_tensor(
    files: Files, engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Not by our own count alone: what was packed is gone."""
    folder = files.roots / f"kind-{kind}"
    VARIANTS[kind].make(files.base, folder, torch.Generator().manual_seed(5))
    packed: list[weakref.ref[torch.Tensor]] = []
    prepare = engine._runner.model.prepare

    def noting(adapter: Adapter) -> PreparedAdapter:
        prepared = prepare(adapter)
        own = [t for t in reachable_tensors(prepared) if not isinstance(t, torch.nn.Parameter)]
        packed.extend(weakref.ref(t) for t in own)
        return prepared

    monkeypatch.setattr(engine._runner.model, "prepare", noting)
    before = engine.adapters.used_bytes
    engine.adapters.load(kind, str(folder)).result(60)
    generate(engine, [request(prompt(1), kind, max_tokens=3)], 60)
    assert any(ref() is not None for ref in packed) and engine.adapters.used_bytes > before
    engine.adapters.unload(kind).result(60)
    gc.collect()
    until(lambda: all(ref() is None for ref in packed), "its tensors are gone")
    assert engine.adapters.used_bytes == before


def reachable_tensors(root: object) -> list[torch.Tensor]:
    found, seen, left = [], set(), [root]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        else:
            left.extend(gc.get_referents(item))
    return found


def test_room_that_will_never_be(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    sizes = {n: engine.adapters.get(n).resident_bytes for n in ("a0", "a1")}
    with fresh(adapter_bytes=sum(sizes.values()) - 1) as small:  # type: ignore[attr-defined]
        for name in sizes:
            small.adapters.load(name, files.uri(name)).result(60)
        with pytest.raises(AdapterTooLarge, match=str(sum(sizes.values()))):
            generate(small, [request(prompt(1), [("a0", 1.0), ("a1", 1.0)])], 20)
        small.adapters.pin("a1", True)
        with pytest.raises(AdapterTooLarge, match=f"{sizes['a1']} bytes of pinned"):
            small.adapters.load("a3", files.uri("a3")).result(20)
        with pytest.raises(AdapterTooLarge, match="pinned"):
            generate(small, [request(prompt(1), "a0")], 20)
        small.adapters.pin("a1", False)
        generate(small, [request(prompt(1), "a0")], 20)
        check_empty(small)


def test_shutdown_leaves_no_future_open(
    files: Files, fresh: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh() as engine:  # type: ignore[attr-defined]
        engine.adapters.load("a0", files.uri("a0")).result(60)
        collector = Collector()
        long = request(prompt(1), "a0", max_tokens=400)
        engine.submit(long, collector)
        gate, threads = hold_reads(engine, monkeypatch)
        futures = [engine.adapters.load(n, files.uri(n)) for n in ("a1", "a2", "a0", "a0")]
        futures.append(engine.adapters.unload("a0"))
        until(lambda: bool(threads), "a read has begun")
        threading.Timer(0.1, gate.set).start()
    for future in futures:
        with pytest.raises(ShuttingDown):
            future.result(0)
    with pytest.raises(ShuttingDown):
        collector.wait(long.request_id, 0)


def test_an_engine_whose_device_is_lost_ends(
    files: Files, fresh: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked fails, nothing is taken any more, and who started it is told."""
    with fresh() as engine:  # type: ignore[attr-defined]
        told, lost = threading.Event(), threading.Event()
        engine.when_dead(told.set)
        runner = engine._runner
        run = runner.run

        def fails(*given: object) -> object:
            if lost.is_set():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return run(*given)

        monkeypatch.setattr(runner, "run", fails)
        monkeypatch.setattr(runner, "scrub", fails)
        monkeypatch.setattr(runner.model.ctx.backend, "works", lambda: not lost.is_set())
        gate, threads = hold_reads(engine, monkeypatch)
        load = engine.adapters.load("a1", files.uri("a1"))
        until(lambda: bool(threads), "a read has begun")
        collector = Collector()
        asked = [request(prompt(i), max_tokens=100) for i in range(2)]
        for r in asked:
            engine.submit(r, collector)
        lost.set()
        for r in asked:
            with pytest.raises(EngineFailure):
                collector.wait(r.request_id, 30)
        assert told.wait(30) and engine.drain(30)
        with pytest.raises(ShuttingDown):
            engine.submit(request(prompt(2)), collector)
        gate.set()
        with pytest.raises(ShuttingDown):
            load.result(30)
        again = threading.Event()
        engine.when_dead(again.set)
        assert again.is_set(), "who asks late is told as well"


# Content:


def test_a_changed_file(files: Files, engine: Engine) -> None:
    folder = files.roots / "changing"
    shutil.copytree(files.roots / "a4", folder)
    old = engine.adapters.load("changing", str(folder)).result(60).digest
    asked = request(prompt(2, 40), "changing")
    first = generate(engine, [asked], 60)[0]
    shutil.rmtree(folder)
    shutil.copytree(files.roots / "a5", folder)
    with pytest.raises(AdapterConflict, match=old[:16]):
        engine.adapters.load("changing", str(folder)).result(60)
    same(generate(engine, [replace(asked, request_id="still")], 60)[0], first)
    engine.adapters.unload("changing").result(60)
    new = engine.adapters.load("changing", str(folder)).result(60).digest
    second = generate(engine, [replace(asked, request_id="new")], 60)[0]
    assert new != old and second.token_ids != first.token_ids
    assert second.last.usage is not None and second.last.usage.cached_tokens == 0
    assert second.last.served_by is not None and second.last.served_by[0].digest == new
    engine.adapters.load("a5", files.uri("a5")).result(60)
    same(alone(engine, request(prompt(2, 40), "a5")), second)
    for name in ("changing", "a5"):
        engine.adapters.unload(name).result(60)


def test_a_file_that_changed_while_its_adapter_was_evicted(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    folder = files.roots / "swapped"
    shutil.copytree(files.roots / "a0", folder)
    size = engine.adapters.get("a0").resident_bytes
    with fresh(adapter_bytes=int(size * 1.5)) as small:  # type: ignore[attr-defined]
        small.adapters.load("x", str(folder)).result(60)
        small.adapters.load("a3", files.uri("a3")).result(60)
        assert small.adapters.get("x").state is AdapterState.REGISTERED
        shutil.rmtree(folder)
        shutil.copytree(files.roots / "a3", folder)
        with pytest.raises(AdapterUnavailable, match="changed since"):
            generate(small, [request(prompt(1), "x")], 30)
        assert small.adapters.get("x").state is AdapterState.FAILED
        again = small.adapters.load("x", str(folder)).result(60)
        assert again.digest == small.adapters.get("a3").digest
        check_empty(small)


def test_a_conflict_while_the_first_load_is_under_way(
    files: Files, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, _ = hold_reads(engine, monkeypatch)
    first = engine.adapters.load("x", files.uri("a4"))
    other = engine.adapters.load("x", files.uri("a5"), pinned=True)
    same_content = engine.adapters.load("x", files.uri("a4"))
    gate.set()
    with pytest.raises(AdapterConflict):
        other.result(30)
    assert first.result(30).digest == same_content.result(30).digest
    info = engine.adapters.get("x")
    assert info.digest == first.result().digest and info.loads == 1 and not info.pinned
    engine.adapters.unload("x").result(30)


def test_a_second_load_brings_an_evicted_adapter_back(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    size = max(engine.adapters.get(f"a{i}").resident_bytes for i in (0, 1))
    with fresh(adapter_bytes=int(size * 1.5)) as small:  # type: ignore[attr-defined]
        for name in ("a0", "a1", "a0"):
            info = small.adapters.load(name, files.uri(name)).result(20)
            assert info.state is AdapterState.READY and info.resident_bytes > 0


def test_one_content_under_two_names(files: Files, engine: Engine) -> None:
    """The second takes no memory, and when it goes, nothing from the one that stays."""
    before = engine.adapters.used_bytes
    twin = engine.adapters.load("twin", files.uri("a0")).result(60)
    assert engine.adapters.used_bytes == before < before + twin.resident_bytes
    assert twin.digest == engine.adapters.get("a0").digest
    asked = [request(prompt(6, 30), name, max_tokens=60) for name in ("a0", "twin")]
    right = alone(engine, asked[0])
    collector = Collector()
    for r in asked:
        engine.submit(r, collector)
    assert engine.adapters.unload("twin").result(60) == 0
    assert engine.adapters.used_bytes == before
    answers = [collector.wait(r.request_id, 60) for r in asked]
    for answer, name in zip(answers, ("a0", "twin"), strict=True):
        same(answer, right)
        assert answer.last.served_by is not None and answer.last.served_by[0].name == name
    same(generate(engine, [replace(asked[0], request_id="after")], 60)[0], right)


# The prefix cache:


def test_the_prefix_cache(engine: Engine) -> None:
    ids = prompt(11, 40)
    first = generate(engine, [request(ids, "a0", max_tokens=6)], 60)[0]
    second = generate(engine, [request(ids, "a0", max_tokens=6)], 60)[0]
    assert first.last.usage is not None and second.last.usage is not None
    assert (first.last.usage.cached_tokens, second.last.usage.cached_tokens) == (0, 32)
    same(second, first)
    salted = replace(request(ids, "a0", max_tokens=6), salt="another tenant")
    for other in (
        request(ids, max_tokens=6),
        request(ids, "a1", max_tokens=6),
        request(ids, [("a0", 0.5)], max_tokens=6),
        request(ids, [("a0", 1.0), ("a1", 1.0)], max_tokens=6),
        salted,
    ):
        answer = generate(engine, [other], 60)[0]
        assert answer.last.usage is not None and answer.last.usage.cached_tokens == 0, other
        same(answer, alone(engine, other), other)


# Pressure:


def test_preemption_changes_nothing(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    """A cache for about three of sixteen long requests; greedy and seeded ones."""
    asked = []
    for i in range(16):
        how = {"temperature": 0.8, "seed": i, "top_p": 0.9} if i % 2 else {}
        penalties = {"repetition_penalty": 1.2} if i % 4 == 1 else {}
        name = ["", "a0", "a1", "a2"][i % 4]
        asked.append(request(prompt(i, 30 + i), name, max_tokens=50, **how, **penalties))
    right = [alone(engine, r) for r in asked]
    assert len({a.token_ids for a in right}) > 12
    tokens = 256
    with fresh(kv_cache_bytes=tokens * 2 * 2 * 32 * 4) as small:  # type: ignore[attr-defined]
        assert small.stats().kv_blocks_total * 8 <= tokens
        for name in ("a0", "a1", "a2"):
            small.adapters.load(name, files.uri(name)).result(60)
        for ours, theirs in zip(generate(small, asked, 120), right, strict=True):
            same(ours, theirs)
        assert small.stats().preemptions > 5
        check_empty(small)


def test_a_seed_gives_the_same_tokens_in_any_company(engine: Engine) -> None:
    seeded = [
        request(prompt(3), name, max_tokens=20, temperature=1.0, seed=seed)
        for name in ("", "a0")
        for seed in (1, 2, 3)
    ]
    right = [alone(engine, r) for r in seeded]
    assert len({a.token_ids for a in right}) == 6
    company = [request(prompt(50 + i), "a1", temperature=1.0, max_tokens=20) for i in range(9)]
    for ours, theirs in zip(generate(engine, [*seeded, *company], 60), right, strict=False):
        same(ours, theirs)


def test_cancelling_at_random_moments_frees_everything(
    files: Files, fresh: Callable[..., object]
) -> None:
    dice = random.Random(3)
    with fresh(kv_cache_bytes=400 * 2 * 2 * 32 * 4) as engine:  # type: ignore[attr-defined]
        for name in ADAPTERS[:3]:
            engine.adapters.load(name, files.uri(name)).result(60)
        collector = Collector()
        asked = [
            request(prompt(i % 7, dice.randint(3, 80)), dice.choice(["", *ADAPTERS[:3]]))
            for i in range(80)
        ]
        for r in asked:
            engine.submit(replace(r, priority=dice.randint(0, 2)), collector)
            if dice.random() < 0.3:
                time.sleep(dice.random() * 0.01)
            engine.cancel(dice.choice(asked).request_id)
        ends = []
        for r in asked:
            try:
                ends.append(str(collector.wait(r.request_id, 60).last.finish_reason))
            except Cancelled:
                ends.append("cancelled")
        assert ends.count("cancelled") > 10 and ends.count("length") > 10
        check_empty(engine)
        for name in ADAPTERS[:3]:
            assert engine.adapters.unload(name).result(10) > 0
        assert engine.adapters.used_bytes == 0


def test_deadlines(files: Files, engine: Engine, fresh: Callable[..., object]) -> None:
    """While running, while waiting for blocks, and while waiting for an adapter."""
    soon = time.monotonic() + 0.3
    running_one = replace(request(prompt(1), "a0", max_tokens=450), deadline=soon)
    with fresh(max_sequences=1, max_batch_tokens=8) as single:  # type: ignore[attr-defined]
        single.adapters.load("a0", files.uri("a0")).result(60)
        until(lambda: time.monotonic() > soon, "past")
        late = replace(request(prompt(1), "a0"), deadline=soon)
        with pytest.raises(DeadlineExceeded):
            generate(single, [late], 20)
        now = time.monotonic()
        asked = [
            replace(running_one, deadline=now + 0.15),
            replace(request(prompt(2)), deadline=now + 0.1),
            request(prompt(2)),
        ]
        collector = Collector()
        single.submit(asked[0], collector)
        until(lambda: single.stats().running == 1, "it has the only place")
        for r in asked[1:]:
            single.submit(r, collector)
        for r in asked[:2]:
            with pytest.raises(DeadlineExceeded):
                collector.wait(r.request_id, 20)
        same(collector.wait(asked[2].request_id, 20), alone(engine, asked[2]))
        check_empty(single)


# Ends and choices:


def test_where_an_answer_ends(engine: Engine) -> None:
    ids = prompt(12)
    whole = generate(engine, [request(ids, "a0", max_tokens=30)], 60)[0]
    assert len(whole.token_ids) == 30 and whole.last.finish_reason is FinishReason.LENGTH
    token = whole.token_ids[9]
    at = whole.token_ids.index(token)

    def ask(**how: object) -> Answer:
        return generate(engine, [request(ids, "a0", **{"max_tokens": 30, **how})], 60)[0]

    stopped = ask(stop_token_ids=(token,))
    assert stopped.token_ids == whole.token_ids[: at + 1]
    assert (stopped.last.finish_reason, stopped.last.stop_reason) == ("stop", str(token))
    later = ask(stop_token_ids=(token,), min_tokens=at + 2)
    assert len(later.token_ids) >= at + 2 and token not in later.token_ids[: at + 1]
    assert later.token_ids[:at] == whole.token_ids[:at]
    text = whole.text[8:11]
    cut = ask(stop=(text,))
    assert cut.text == whole.text[: whole.text.index(text)] and cut.last.stop_reason == text
    assert cut.last.finish_reason is FinishReason.STOP and len(cut.token_ids) < 30
    favoured = ask(logit_bias=((77, 1000.0),))
    assert set(favoured.token_ids) == {77}
    banned = ask(logit_bias=((whole.token_ids[0], -1000.0),))
    assert whole.token_ids[0] not in banned.token_ids
    eos = ask(logit_bias=((257, 1000.0),), ignore_eos=False)
    assert (eos.last.finish_reason, eos.token_ids, eos.text) == ("stop", (257,), "")
    assert len(ask(logit_bias=((257, 1000.0),), ignore_eos=False, min_tokens=5).token_ids) == 6


@pytest.mark.parametrize("mix", [[], [("a0", 1.0)], [("a0", 0.5), ("a2", 1.0)]])
def test_scores_equal_the_logprobs_of_generation(
    engine: Engine, mix: list[tuple[str, float]]
) -> None:
    ids = prompt(13, 37)
    answer = generate(engine, [request(ids, mix, max_tokens=25)], 60)[0]
    scored = request([*ids, *answer.token_ids], mix, max_tokens=0, score_from=len(ids))
    for again in (scored, replace(scored, request_id="cached")):
        scores = generate(engine, [again], 60)[0].last.prompt_logprobs
        assert [s.token_id for s in scores] == list(answer.token_ids)
        for ours, theirs in zip(scores, answer.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE)


class SlowAtTheEnd(Collector):
    def deliver(self, outputs: list[Output]) -> None:
        if any(o.finish_reason is not None for o in outputs):
            time.sleep(0.05)
        super().deliver(outputs)


def test_drain(files: Files, fresh: Callable[..., object]) -> None:
    """New requests are refused; once it returns, everybody has their answer."""
    with fresh() as engine:  # type: ignore[attr-defined]
        engine.adapters.load("a0", files.uri("a0")).result(60)
        collector = SlowAtTheEnd()
        asked = [request(prompt(i), "a0" if i % 2 else "", max_tokens=100) for i in range(4)]
        right = [alone(engine, r) for r in asked]
        for r in asked:
            engine.submit(r, collector)
        assert not engine.drain(0.001)
        with pytest.raises(ShuttingDown):
            engine.submit(request(prompt(1), "a0"), collector)
        assert engine.drain(60)
        for r, theirs in zip(asked, right, strict=True):
            same(collector.wait(r.request_id, 0), theirs)
        check_empty(engine)


def test_the_model_serves_another_engine_after_the_first(files: Files) -> None:
    model, asked, answers = load_base(files.base), request(prompt(3), "a1"), []
    for i in range(2):
        with running(model, [files.roots]) as made:
            made.adapters.load("a1", files.uri("a1")).result(60)
            answers.append(generate(made, [replace(asked, request_id=f"engine{i}")], 60)[0])
    same(*answers)


# Waiting:


def test_a_request_that_may_not_wait_is_refused_or_ended(
    files: Files, fresh: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One place, and a long answer in it. Where no wait is expected it is let in, and ended when
    its time is up; else it is refused at once."""
    with fresh(max_sequences=1, max_wait=30.0) as small:  # type: ignore[attr-defined]
        long, collector = request(prompt(5), max_tokens=400), Collector()
        small.submit(long, collector)
        until(lambda: small.stats().running == 1, "it runs")
        hasty = replace(request(prompt(6), max_tokens=400), max_wait=0.02)
        with monkeypatch.context() as patch:
            patch.setattr(small._intake, "expected", lambda sequence: 0.0)
            small.submit(hasty, collector)
        with pytest.raises(DeadlineExceeded, match=r"max_wait_seconds: no token within 0.02 s"):
            collector.wait(hasty.request_id, 20)
        with pytest.raises(Overloaded, match=r"max_wait_seconds: 0.02 s, and the first") as caught:
            small.submit(replace(hasty, request_id="again"), collector)
        assert caught.value.retry_after > 0
        small.cancel(long.request_id)
        check_empty(small)


def test_a_full_server_sheds_the_flood_and_serves_the_newcomer(
    files: Files, engine: Engine, fresh: Callable[..., object]
) -> None:
    right = alone(engine, request(prompt(4), "a0"))
    with fresh(max_sequences=1, max_queue=6) as small:  # type: ignore[attr-defined]
        small.adapters.load("a0", files.uri("a0")).result(60)
        flood, collector = [request(prompt(i), max_tokens=60) for i in range(6)], Collector()
        for r in flood:
            small.submit(r, collector)
        asked = request(prompt(4), "a0")
        small.submit(asked, collector)
        with pytest.raises(Overloaded, match="the last one for the base gave way"):
            collector.wait(flood[-1].request_id, 20)
        same(collector.wait(asked.request_id, 60), right)
        for r in flood[:-1]:
            assert len(collector.wait(r.request_id, 60).token_ids) == 60
        check_empty(small)
