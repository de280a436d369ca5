"""Loader processes that share nothing with the server make what it would make itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import apart
import psutil
import pytest
import torch
from peft import HRAConfig
from rig import load_base
from serving import until
from torch import Tensor
from variants import VARIANTS, make_base, peft_variant

from deltaserve.adapters.errors import SourceForbidden
from deltaserve.adapters.options import DEFAULT
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.server.config import AdapterConfig
from deltaserve.server.engine.loader_process import AVAILABLE, Fresh, LoaderProcesses
from deltaserve.server.engine.make import Source, Wanted
from deltaserve.server.engine.recipe import Recipe, make_here
from deltaserve.server.errors import AdapterUnavailable, ShuttingDown
from deltaserve.server.model import BaseModel

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux")

BUDGET = 1 << 30
NAMES = ("lora-r11", "dora", "hra", "ia3", "lora-modules-to-save", "lora-embedding")
NAMES += ("lora-tokens", "bitdelta-published", "sparse", "half-fine-tune", "prefix-tuning")
HRA = peft_variant(
    "hra", lambda config: HRAConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fresh")
    make_base(root / "base", "llama")
    for i, name in enumerate(NAMES):
        variant = HRA if name == "hra" else VARIANTS[name]
        variant.make(root / "base", root / "adapters" / name, torch.Generator().manual_seed(i))
    return root


@pytest.fixture(scope="module")
def model(family: Path) -> Iterator[BaseModel]:
    """On a device; its layers, which are not run here, are not fused."""
    with apart.backend() as backend, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBackend, "layer", lambda *_: None)
        yield load_base(family / "base", dtype="bfloat16", quantize="int4", backend=backend)


@pytest.fixture(scope="module")
def processes(family: Path, model: BaseModel) -> Iterator[LoaderProcesses]:
    recipe = Recipe.of(config(family), model.spec, model.packer, BUDGET)
    made = LoaderProcesses(Fresh(recipe, model.spec))
    try:
        yield made
    finally:
        made.close()


def config(family: Path) -> AdapterConfig:
    return AdapterConfig(roots=(family / "adapters",))


def source(family: Path, name: str) -> Source:
    return Source(str(family / "adapters" / name), DEFAULT)


def plain(value: Any) -> Any:
    """Something that is equal for equal bytes."""
    if isinstance(value, Tensor):
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return value.dtype, tuple(value.shape), raw
    if is_dataclass(value):
        return type(value), {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    return value


def test_every_kind_of_adapter_is_packed_alike(
    family: Path, model: BaseModel, processes: LoaderProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are lowered by the base's weights, as they are served."""
    asked: list[str] = []

    def weight(module: str) -> Tensor:
        asked.append(module)
        return model.spec.weight(module)

    noting = replace(model.spec, weight=weight)
    monkeypatch.setattr(processes._way, "_base", noting)
    here = make_here(config(family), noting, model, BUDGET)
    lines = [(source(family, name),) for name in NAMES]
    lines.append((source(family, "lora-r11"), source(family, "dora")))
    for line in lines:
        wanted = here(line, Wanted.ALL)
        own = asked.copy()
        asked.clear()
        found = processes(line, Wanted.ALL)
        assert found.digests == wanted.digests, line
        assert plain(found.prepared) == plain(wanted.prepared), line
        assert found.prepared is not None
        assert found.nbytes == wanted.nbytes == found.prepared.nbytes > 0
        assert asked == own, line
        assert own or not any(name in line[-1].uri for name in ("dora", "hra")), line
        asked.clear()


def loaders(processes: LoaderProcesses) -> list[psutil.Process]:
    return psutil.Process(processes._nursery.pid).children()


def mapped(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()


def test_they_have_neither_a_gpu_nor_what_runs_one(
    family: Path, processes: LoaderProcesses
) -> None:
    processes((source(family, "dora"),), Wanted.ALL)
    (loader,) = loaders(processes)
    for process in (loader, psutil.Process(processes._nursery.pid)):
        maps = mapped(process)
        assert "libtorch_cpu" in maps
        assert not [lib for lib in ("libtriton", "libcuda.so", "tokenizers") if lib in maps]
        assert process.environ()["CUDA_VISIBLE_DEVICES"] == ""
        assert process.nice() == min(19, os.nice(0) + 10)
        assert process.num_threads() <= 2


def test_what_is_raised_there_is_raised_here(
    family: Path, processes: LoaderProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceForbidden, match=r"^'/etc': leads outside"):
        processes((Source("/etc", DEFAULT),), Wanted.ALL)

    def lost(module: str) -> Tensor:
        raise ZeroDivisionError(f"no {module}")

    way: Any = processes._way
    monkeypatch.setattr(way, "_base", replace(way._base, weight=lost))
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: no model\.layers"):
        processes((source(family, "dora"),), Wanted.ALL)
    monkeypatch.undo()
    assert processes((source(family, "dora"),), Wanted.ALL).prepared is not None


def test_one_that_dies_fails_its_load_alone(family: Path, processes: LoaderProcesses) -> None:
    line = (source(family, "lora-r11"),)
    right = processes(line, Wanted.DIGEST).digests
    (first,) = loaders(processes)
    os.kill(first.pid, signal.SIGSTOP)
    failed: list[BaseException] = []

    def load() -> None:
        with pytest.raises(AdapterUnavailable, match=r"that loaded .*lora-r11 died") as error:
            processes(line, Wanted.ALL)
        failed.append(error.value)

    thread = threading.Thread(target=load)
    thread.start()
    until(lambda: bool(processes._busy), "it has begun")
    os.kill(first.pid, signal.SIGKILL)
    thread.join(30)
    assert failed and processes(line, Wanted.DIGEST).digests == right
    for process in [p for p in loaders(processes) if p.pid != first.pid]:  # one that is idle
        end(process)
    assert processes(line, Wanted.DIGEST).digests == right


def test_what_starts_them_is_started_anew_and_ends_with_the_server(
    family: Path, processes: LoaderProcesses
) -> None:
    line = (source(family, "lora-r11"),)
    right = processes(line, Wanted.DIGEST).digests
    first = [psutil.Process(processes._nursery.pid), *loaders(processes)]
    for process in first:
        end(process)
    assert processes(line, Wanted.DIGEST).digests == right
    again = [psutil.Process(processes._nursery.pid), *loaders(processes)]
    assert len(first) >= 2 == len(again)
    processes.close()
    until(lambda: not any(p.is_running() for p in (*first, *again)), "all are gone")
    with pytest.raises(ShuttingDown):
        processes(line, Wanted.DIGEST)


def end(process: psutil.Process) -> None:
    process.kill()
    gone = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    until(lambda: not process.is_running() or process.status() in gone, "it is gone")
