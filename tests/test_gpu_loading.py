"""On a device: adapters come and go through its memory and the host's, and a server starts on
kernels that were found to be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import apart
import pytest
import torch
from rig import load_base, request, running
from variants import VARIANTS, make_base

from deltaserve.kernels.gpu import gemm, selftest
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.server.config import AdapterConfig, Config, ConfigError, EngineConfig, ModelConfig
from deltaserve.server.engine import build
from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.host_tier import HostTier
from deltaserve.server.engine.loader_process import AVAILABLE, Fresh, LoaderProcesses
from deltaserve.server.engine.observer import NullObserver
from deltaserve.server.model import load

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
        gpu.arena.check_integrity()
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
    monkeypatch.setattr(build, "open_backend", lambda device: gpu)
    monkeypatch.setattr(selftest, "BUCKETS", (16,))
    said: list[str] = []
    engine, _ = build.build_engine(
        config(family), NullObserver(), lambda share, what: said.append(what)
    )
    assert said[-1] == "testing kernels" and engine.info().device == "cuda"
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
