"""On a device: adapters come and go through its memory and the host's, and a server starts on
kernels that were found to be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import apart
import pytest
import torch
from engine_pair import check
from rig import load_base, request, running
from variants import VARIANTS, make_base

from deltaserve.kernels.gpu import backend, gemm, selftest
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.kernels.gpu.variants import GroupSpec
from deltaserve.server.config import AdapterConfig, Config, ConfigError, EngineConfig, ModelConfig
from deltaserve.server.engine import build
from deltaserve.server.engine.block_pool import BlockPool
from deltaserve.server.engine.collector import Collector, generate
from deltaserve.server.engine.core import Tier
from deltaserve.server.engine.host_tier import HostTier
from deltaserve.server.engine.kv_memory import Moves
from deltaserve.server.engine.kv_pool import KVShape
from deltaserve.server.engine.loader_process import AVAILABLE, Fresh, LoaderProcesses
from deltaserve.server.engine.observer import NullObserver
from deltaserve.server.model import load, probe

NAMES = ("a", "b", "c")


@pytest.fixture
def gpu() -> Iterator[TritonBackend]:
    with nullcontext(TritonBackend()) if torch.cuda.is_available() else apart.backend() as found:
        yield found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loading")
    make_base(root / "base", "llama")
    for i, name in enumerate(NAMES):
        VARIANTS["lora"].make(
            root / "base", root / "adapters" / name, torch.Generator().manual_seed(i)
        )
    return root


def test_adapters_take_turns_in_the_device_and_the_host(
    gpu: TritonBackend, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two of three on the device, and for the third in the host's memory."""
    roots = [family / "adapters"]
    asked = [request([5, 6, 7 + i], NAMES[i % 3], max_tokens=2) for i in range(7)]
    with running(load_base(family / "base"), roots) as cpu:
        for name in NAMES:
            cpu.adapters.load(name, str(roots[0] / name)).result(60)
        right = [generate(cpu, [r], 60)[0].token_ids for r in asked]
    model = load(family / "base", dtype=torch.float32, backend=gpu)
    with running(model, roots, adapter_bytes=1 << 20) as probe:
        packed = probe.adapters.load("a", str(roots[0] / "a")).result(60).resident_bytes
        assert gpu.arena.used == packed == probe.adapters.used_bytes
    assert gpu.arena.used == 0
    model = load(family / "base", dtype=torch.float32, backend=gpu)
    taken: list[object] = []
    take = HostTier.take

    def spy(tier: HostTier[Any], key: Any) -> Any:
        found = take(tier, key)
        taken.extend([] if found is None else [found])
        return found

    monkeypatch.setattr(HostTier, "take", spy)
    tier = {"host_bytes": packed, "loader_processes": AVAILABLE}
    with running(model, roots, adapter_bytes=2 * packed + 100, adapters=tier) as engine:
        assert not gpu.arena.grows
        make: object = engine.adapters._loader._make
        assert not AVAILABLE or (isinstance(make, LoaderProcesses) and isinstance(make._way, Fresh))
        for name in NAMES:
            engine.adapters.load(name, str(roots[0] / name)).result(60)
        for i, r in enumerate(asked):
            (answer,) = generate(engine, [replace(r, request_id=f"again{i}")], 60)
            assert answer.token_ids == right[i]
            assert gpu.arena.used == engine.adapters.used_bytes <= 2 * packed
        assert engine.adapters.evictions >= 4 and len(taken) >= 3
        tiers = Counter(engine.adapters.get(name).tier for name in NAMES)
        assert tiers == {Tier.DEVICE: 2, Tier.HOST: 1}
        stats = engine.stats()
        assert (stats.adapter_bytes_device, stats.adapter_bytes_host) == (2 * packed, packed)
        gpu.arena.check_integrity()
    assert gpu.arena.used == 0


def test_cache_and_adapters_take_turns_in_the_devices_memory(
    gpu: TritonBackend, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for an adapter beside six blocks, or for more blocks: those of a request that
    runs are moved for an adapter that comes, and that goes for a request that needs blocks."""
    roots = [family / "adapters"]
    moved: list[int] = []
    shrink = BlockPool.shrink

    def spy(pool: BlockPool, blocks: int, moves: Moves) -> None:
        moved.append(len(moves))
        shrink(pool, blocks, moves)

    monkeypatch.setattr(BlockPool, "shrink", spy)
    short, long = request(range(20, 52), max_tokens=1), request(range(50, 60), max_tokens=12)
    adapted = [request([5, 6, 7], "a", max_tokens=2), request(range(60, 80), "b", max_tokens=2)]
    wide = [request(range(n, n + 30), max_tokens=2) for n in (90, 130)]
    asked = [short, long, *adapted, *wide]
    small: dict[str, Any] = {"max_length": 40, "kv_cache_bytes": None, "max_batch_tokens": 40}
    with running(load_base(family / "base"), roots, max_length=40) as cpu:
        for name in "ab":
            cpu.adapters.load(name, str(roots[0] / name)).result(60)
        right = {r.request_id: generate(cpu, [r], 60)[0] for r in asked}
    model = load(family / "base", dtype=torch.float32, backend=gpu)
    block = KVShape.of(model.attention, 8, torch.float32, by_page=False).block
    with running(model, roots, memory=1 << 20, **small) as engine:
        packed = engine.adapters.load("a", str(roots[0] / "a")).result(60).resident_bytes
    model = load(family / "base", dtype=torch.float32, backend=gpu)
    with running(model, roots, memory=6 * block + packed, **small) as engine:
        collector = Collector()
        for r in (short, long):
            engine.submit(r, collector)
        found = [collector.wait(short.request_id, 60)]
        for name in "ab":
            info = engine.adapters.load(name, str(roots[0] / name)).result(60)
            assert info.tier is Tier.DEVICE and engine.stats().adapter_bytes_device == packed
            assert sum(moved) > 0 and engine.stats().running == 1
        found.append(collector.wait(long.request_id, 60))
        for r in adapted:
            found += generate(engine, [r], 60)
        assert engine.stats().kv_blocks_there <= 6
        found += generate(engine, wide, 60)
        assert engine.stats().adapter_bytes_device == 0
        again = replace(adapted[0], request_id="again")
        assert generate(engine, [again], 60)[0].token_ids == right[adapted[0].request_id].token_ids
        for r, answer in zip(asked, found, strict=True):
            check(answer, right[r.request_id], r.request_id)
        engine._scheduler.check_integrity()
    assert gpu.arena.used == 0


def config(family: Path, **adapters: int) -> Config:
    return Config(
        replace(ModelConfig(family / "base"), dtype="float32", device="cuda"),
        AdapterConfig(**adapters),  # type: ignore[arg-type]
        EngineConfig(kv_cache_bytes=1 << 20),
    )


def test_a_server_starts_on_kernels_that_are_right(
    gpu: TritonBackend, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made ready is every linear, such that no adapter may act on too."""
    monkeypatch.setattr(build, "open_backend", lambda device: gpu)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    by_token = probe._by_token
    odd = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(probe, "_by_token", lambda *given: {*by_token(*given)} - {odd})
    found: list[GroupSpec] = []
    make_ready = backend.make_ready

    def spy(groups: set[GroupSpec], *given: Any) -> None:
        found.extend(groups)
        make_ready(groups, *given)

    monkeypatch.setattr(backend, "make_ready", spy)
    said: list[str] = []
    engine, _ = build.build_engine(
        config(family), NullObserver(), lambda share, what: said.append(what)
    )
    assert said[-1] == "testing kernels" and engine.info().device == "cuda"
    (alone,) = (spec for spec in found if not spec.adapters)
    assert (alone.in_features, alone.parts) == (96, (64,)) and len(found) > 1
    right = gemm.launch

    def short(kernel: object, grid: tuple[int, ...], *rest: object, **named: object) -> None:
        right(kernel, (grid[0], max(1, grid[1] - 1)), *rest, **named)  # not the last columns

    monkeypatch.setattr(gemm, "launch", short)
    with pytest.raises(ConfigError, match=r"^--device cuda: self-test: unquantized linears.*wrong"):
        build.build_engine(config(family), NullObserver())


def test_a_host_tier_is_for_devices_of_their_own_memory(family: Path) -> None:
    given = config(family, host_bytes=1000)
    given = replace(given, model=replace(given.model, device="cpu"))
    with pytest.raises(ConfigError, match=r"^--host-adapter-bytes 1000: on --device cpu"):
        build.build_engine(given, NullObserver())
