"""Everything at once, for a while: requests of every kind come, are cancelled and run out of time
while adapters are loaded, unloaded, pinned, evicted and refused, in a cache that is far too small.

Every answer is the one that the request gets alone, and in the end nothing is left: no block, slot,
byte, thread or object. SOAK_SECONDS makes it longer.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft_methods import CASES
from rig import load_base, request, running
from serving import until
from test_equivalence import MIXES
from variants import VARIANTS, make_base, open_base

from deltaserve.adapters.errors import MalformedAdapter
from deltaserve.server.engine.collector import Answer, Collector, generate
from deltaserve.server.engine.core import (
    AdapterRef,
    Combination,
    Member,
    Request,
    Rule,
    Speculation,
)
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.errors import (
    AdapterBusy,
    AdapterTooLarge,
    AdapterUnavailable,
    AdapterUnknown,
    Cancelled,
    DeadlineExceeded,
    RequestError,
)
from deltaserve.server.packing.prepared import PreparedAdapter

SECONDS = float(os.environ.get("SOAK_SECONDS", "15"))
TOLERANCE = 1e-4
MARGIN = 1e-3
"""Requests whose best tokens are closer than this may differ by rounding: they are not asked."""
KV_BLOCKS = 26
GROWTH = 48 << 20
"""Bytes that the process may grow from the first third to the end: allocators keep some."""
EXCUSED = (
    AdapterBusy,
    AdapterTooLarge,
    AdapterUnavailable,
    AdapterUnknown,
    Cancelled,
    DeadlineExceeded,
)
"""What a request may end with while adapters come, go and are pinned, or it is cancelled."""

METHODS = (
    "adalora", "boft", "c3a", "cartridge", "cpt", "fourierft", "glora-lora", "gralora", "hira",
    "hra", "ln-tuning", "loha", "lokr", "miss", "oft", "p-tuning", "randlora", "road-1",
    "trainable-tokens", "vera",
)  # fmt: skip
KINDS = (*VARIANTS, *METHODS)

_ids = itertools.count()


@dataclass
class World:
    base: Path
    roots: Path
    pool: list[Request]
    right: dict[str, Answer]
    adapter_bytes: int

    def uri(self, name: str) -> str:
        return str(self.roots / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base, roots = tmp_path_factory.mktemp("soak") / "base", tmp_path_factory.mktemp("roots")
    make_base(base, "llama")
    generator = torch.Generator().manual_seed(5)
    for name, variant in VARIANTS.items():
        variant.make(base, roots / name, generator)
    for name in METHODS:
        CASES[name].make(open_base(base), roots / name)
    (roots / "damaged").mkdir()
    (roots / "damaged" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (roots / "damaged" / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with running(load_base(base), [roots], max_batch_tokens=256) as engine:
        for name in KINDS:
            engine.adapters.load(name, str(roots / name)).result(60)
        right = {r.request_id: generate(engine, [r], 60)[0] for r in pool()}
        largest = max(a.resident_bytes for a in engine.adapters.list())
    asked = [r for r in pool() if decided(right[r.request_id])]
    assert len(asked) > len(right) / 2
    return World(base, roots, asked, right, largest * 3 // 2)


def pool() -> list[Request]:
    """Greedy and seeded ones of the base, every kind, mixes and combinations of kinds. Some repeat
    themselves, so that drafts of what comes next are right."""
    draws = random.Random(17)
    kinds: list[Any] = ["", *KINDS, *MIXES.values()]
    found = []
    for i, adapters in enumerate([*kinds, *kinds]):
        prompt = [draws.randrange(256) for _ in range(draws.randint(3, 70))]
        if i % 2:
            prompt = (prompt[:8] * 9)[: len(prompt)]
        how = {"temperature": 0.8, "seed": i} if i % 3 == 2 else {}
        made = request(prompt, adapters, max_tokens=draws.randint(1, 24), logprobs=2, **how)
        if i % 7 == 3:
            made = replace(made, adapters=(), combination=combination(made, draws))
        found.append(replace(made, request_id=f"pool{i}", speculation=Speculation(i % 5)))
    return found


def combination(asked: Request, draws: random.Random) -> Combination:
    """The request's adapters and another kind, each with a cache of its own."""
    other = (AdapterRef(draws.choice(["lora", "bitdelta", "ia3"])),)
    rule = draws.choice([Rule.MEAN, Rule.PRODUCT])
    return Combination((Member(asked.adapters), Member(other, 0.5)), rule)


def decided(answer: Answer) -> bool:
    """Rounding cannot change the greedy tokens; of drawn ones nothing is known, but a draw is a
    comparison as well, and a different one would be seen in few of them."""
    return all(len(p.top) < 2 or abs(p.top[0][1] - p.top[1][1]) > MARGIN for p in answer.logprobs)


@dataclass
class Tally:
    """What happened, and what must not."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def run(self, engine: Engine, world: World, draws: random.Random) -> None:
        """One request of the pool, perhaps cancelled, perhaps without enough time."""
        plan = draws.choice(world.pool)
        name = f"soak{next(_ids)}"
        deadline = time.monotonic() + draws.uniform(0, 0.3) if draws.random() < 0.1 else None
        asked = replace(plan, request_id=name, deadline=deadline, priority=draws.randint(-1, 1))
        collector = Collector()
        try:
            engine.submit(asked, collector)
            if draws.random() < 0.15:
                time.sleep(draws.uniform(0, 0.05))
                engine.cancel(name)
            got = collector.wait(name, 60)
        except EXCUSED as error:
            self.done[type(error).__name__] += 1
        except (RequestError, TimeoutError) as error:
            self.wrong.append(f"{plan}: {error!r} {engine.stats()}")
        else:
            self.done["answered"] += 1
            if not equal(got, world.right[plan.request_id]):
                self.wrong.append(f"{plan}: {got.token_ids}")


def equal(got: Answer, right: Answer) -> bool:
    close = (
        abs(x.logprob - y.logprob) < TOLERANCE
        for x, y in zip(got.logprobs, right.logprobs, strict=False)
    )
    return got.token_ids == right.token_ids and got.text == right.text and all(close)


def churn(engine: Engine, world: World, draws: random.Random, tally: Tally) -> None:
    """One change to the adapters. Waits for it now and then, so that not all of them overlap."""
    name = draws.choice(KINDS)
    what = draws.choice(("load", "load", "load", "unload", "pin", "unpin", "damaged", "list"))
    futures: list[Future[Any]] = []
    try:
        if what == "load":
            futures.append(engine.adapters.load(name, world.uri(name)))
        elif what == "unload":
            futures.append(engine.adapters.unload(name))
        elif what in ("pin", "unpin"):
            engine.adapters.pin(name, what == "pin")
        elif what == "damaged":
            futures.append(engine.adapters.load("damaged", world.uri("damaged")))
        else:
            assert all(a.in_flight >= 0 for a in engine.adapters.list())
        tally.done[what] += 1
        if draws.random() < 0.5:
            for future in futures:
                future.result(60)
    except Exception as error:
        if not isinstance(error, MalformedAdapter if what == "damaged" else EXCUSED):
            tally.wrong.append(f"{what} {name}: {error!r}")


def test_everything_at_once(world: World, earlier: set[int]) -> None:
    seed = int(os.environ.get("SOAK_SEED", random.randrange(2**32)))
    threads = threading.active_count()
    model = load_base(world.base)
    token_bytes = 2 * 2 * (16 + 16) * 4
    config = {"kv_cache_bytes": KV_BLOCKS * 8 * token_bytes, "max_sequences": 12}
    tally = Tally()
    with running(model, [world.roots], adapter_bytes=world.adapter_bytes, **config) as engine:
        for name in KINDS:
            engine.adapters.load(name, world.uri(name)).result(60)
        early = soak(engine, world, seed, tally)
        assert not tally.wrong, (seed, tally.wrong[:5], engine.adapters.list())
        settle(engine)
        late = resident()
        stats = engine.stats()
        for adapter in engine.adapters.list():
            if adapter.pinned:
                engine.adapters.pin(adapter.name, False)
            engine.adapters.unload(adapter.name).result(60)
        assert engine.adapters.used_bytes == 0 and not model.modules._installed, seed
    assert late - early < GROWTH, (seed, early, late)
    assert stats.preemptions > 0 and stats.adapter_evictions > 0, (seed, stats)
    for what in ("answered", "load", "unload", "damaged", "Cancelled"):
        assert tally.done[what] > 0, (seed, tally.done)
    until(lambda: threading.active_count() <= threads, f"{threads} threads again")
    del engine
    left = [o for kind in (Sequence, PreparedAdapter) for o in alive(kind)]
    assert {id(o) for o in left} <= earlier, seed


def soak(engine: Engine, world: World, seed: int, tally: Tally) -> int:
    """Six askers and one who changes the adapters. -> bytes held after a third of the time."""
    began = time.monotonic()

    def keep(do: Callable[[random.Random], None], number: int) -> None:
        draws = random.Random(seed + number)
        while time.monotonic() < began + SECONDS and not tally.wrong:
            do(draws)

    def ask(draws: random.Random) -> None:
        tally.run(engine, world, draws)

    def change(draws: random.Random) -> None:
        churn(engine, world, draws, tally)
        time.sleep(draws.uniform(0, 0.02))

    doers = [ask] * 6 + [change]
    running_ = [
        threading.Thread(target=keep, args=(do, i), daemon=True) for i, do in enumerate(doers)
    ]
    for thread in running_:
        thread.start()
    time.sleep(SECONDS / 3)
    early = resident()
    for thread in running_:
        thread.join(SECONDS + 90)
        assert not thread.is_alive(), f"seed {seed}: somebody waits for ever"
    return early


def settle(engine: Engine) -> None:
    """Nothing runs, so nothing is held."""
    until(lambda: engine.stats().kv_blocks_used == 0, "the blocks come back")
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    until(lambda: all(a.in_flight == 0 for a in engine.adapters.list()), "nothing in flight")
    engine.check_integrity()


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def alive(kind: type) -> list[Any]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is kind]


@pytest.fixture
def earlier() -> Iterator[set[int]]:
    """What is left of other tests of this process: their ids stay theirs while the test runs."""
    held = [o for kind in (Sequence, PreparedAdapter) for o in alive(kind)]
    yield {id(o) for o in held}
    del held
