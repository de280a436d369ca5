"""One budget on a real engine: what the cache does not use adapters have, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import VeraConfig
from rig import load_base, request, running
from variants import VARIANTS, make_base, peft_variant

from deltaserve.server.engine.collector import Answer, generate
from deltaserve.server.engine.core import AdapterRef, Combination, Member, Request
from deltaserve.server.engine.engine import Engine
from deltaserve.server.errors import InvalidRequest
from deltaserve.server.model import BaseModel

ADAPTERS = [f"a{i}" for i in range(8)]
LENGTH = 128
BUDGET = 320 << 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "base"
    make_base(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def roots(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate(ADAPTERS):
        VARIANTS["lora"].make(base, folder / name, torch.Generator().manual_seed(i))
    return folder


@pytest.fixture
def model(base: Path) -> BaseModel:
    return load_base(base)


@pytest.fixture
def small(base: Path, roots: Path) -> Iterator[Engine]:
    with running(
        load_base(base), [roots], memory=BUDGET, kv_cache_bytes=None, max_length=LENGTH
    ) as engine:
        yield engine


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def test_the_cache_and_the_adapters_take_turns(
    model: BaseModel, roots: Path, small: Engine
) -> None:
    long = [request(prompt(i, 100), max_tokens=20) for i in range(16)]
    adapted = [
        request(prompt(50 + i, 20), ADAPTERS[i % len(ADAPTERS)], max_tokens=8) for i in range(24)
    ]
    with running(model, [roots], max_length=LENGTH) as alone:
        for name in ADAPTERS:
            alone.adapters.load(name, str(roots / name)).result(60)
        right = {r.request_id: generate(alone, [r], 60)[0] for r in (*long, *adapted)}
        each = alone.adapters.get("a0").resident_bytes
    assert each * len(ADAPTERS) > BUDGET * 0.6, "they do not fit beside a full cache"
    for name in ADAPTERS:
        small.adapters.load(name, str(roots / name)).result(60)
    loaded = small.stats()
    run(small, long, right, "first")
    full = small.stats()
    assert full.kv_bytes > loaded.kv_bytes + each and full.adapter_evictions > 0
    run(small, adapted, right, "adapters")
    crowded = small.stats()
    assert crowded.kv_bytes < full.kv_bytes
    assert crowded.adapter_bytes_host > full.adapter_bytes_host
    run(small, long, right, "second")
    run(small, [r for pair in zip(long, adapted, strict=False) for r in pair], right, "mixed")


def run(engine: Engine, asked: list[Request], right: dict[str, Answer], phase: str) -> None:
    """All at once, within the budget, each as it is alone."""
    again = [replace(r, request_id=f"{phase}-{r.request_id}", salt=phase) for r in asked]
    for r, ours in zip(asked, generate(engine, again, 120), strict=True):
        theirs = right[r.request_id]
        assert ours.token_ids == theirs.token_ids, (phase, r.adapters)
        for x, y in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
    stats = engine.stats()
    assert stats.kv_bytes + stats.adapter_bytes_host <= stats.memory_budget == BUDGET
    engine._scheduler.blocks.check_integrity()
    engine.adapters._residents.check_integrity()


def test_the_matrices_of_vera_adapters_are_held_once(base: Path, tmp_path: Path) -> None:
    """Loaded one by one from files of their own, each in the serving dtype's own copy."""
    vera = peft_variant(
        "vera",
        lambda config: VeraConfig(
            task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "o_proj"], save_projection=True
        ),
    )
    for name in "abc":
        vera.make(base, tmp_path / name, torch.Generator().manual_seed(ord(name)))
    for dtype in ("float32", "bfloat16"):
        with running(load_base(base, dtype=dtype), [tmp_path]) as engine:
            cache = engine.adapters
            sizes, used = [], []
            for name in "abc":
                info = cache.load(name, str(tmp_path / name)).result(60)
                sizes.append(info.resident_bytes)
                used.append(cache.used_bytes)
            matrices = 16 * 64 * (4 if dtype == "float32" else 2)
            own = sizes[0] - matrices
            assert own > 0 and sizes == [sizes[0]] * 3
            assert used == [sizes[0] + i * own for i in range(3)]
            assert cache.unload("a").result(60) == own and cache.used_bytes == used[1]
            asked = [request(prompt(3, 20), name) for name in "bc"]
            generate(engine, asked, 60)
            assert [cache.unload(n).result(60) for n in "bc"] == [own, sizes[0]]
            assert cache.used_bytes == 0


def test_a_combination_of_more_than_the_longest_request_finds_its_room(
    model: BaseModel, roots: Path, small: Engine
) -> None:
    """Others wait for adapters that take its room, and those of each other."""

    def combined(seed: int, names: list[str]) -> Request:
        members = tuple(Member((AdapterRef(name),)) for name in names)
        asked = request(prompt(seed, 60), max_tokens=24)
        return replace(asked, combination=Combination(members))

    long = [combined(i, [ADAPTERS[i], ADAPTERS[i + 1]]) for i in range(4)]
    others = [request(prompt(30 + i, 70), ADAPTERS[i % 8], max_tokens=12) for i in range(12)]
    asked = [r for trio in zip(others, others[4:], long, strict=False) for r in trio]
    asked = list(dict.fromkeys(asked))
    for name in ADAPTERS:
        small.adapters.load(name, str(roots / name)).result(60)
    with running(model, [roots], max_length=LENGTH) as alone:
        for name in ADAPTERS:
            alone.adapters.load(name, str(roots / name)).result(60)
        right = {r.request_id: generate(alone, [r], 60)[0] for r in asked}
    need = 2 * 11 * 8 * 512
    assert need > small.info().memory.kv_floor
    run(small, asked, right, "combined")
    too_long = replace(
        combined(9, ADAPTERS[:4]), prompt_ids=tuple(prompt(9, 100)), request_id="too-long"
    )
    with pytest.raises(InvalidRequest, match=r"4 adapters and .* bytes of keys and values"):
        generate(small, [too_long], 60)
