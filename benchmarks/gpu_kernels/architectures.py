"""Every architecture that is served, small and random: the engine on the GPU beside the engine on
the CPU, with the base, LoRA, other kinds and a weighted pair in one mixed batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from gpu_kernels.data import ON_GPU
from gpu_kernels.engines import Asked, compare

if TYPE_CHECKING:
    from gpu_kernels.check import Report

TESTS = Path(__file__).parents[2] / "tests"
GROUP = 32
PROMPT = 9
SEQUENCES = 8
"""More than are asked at once; each number of tokens up to it is compiled for and captured."""
TOKENS = 4 if ON_GPU else 2
QUANTIZED = ("none", "int4") if ON_GPU else ("none",)
TOLERANCE = 1e-3
"""Of a log-probability, in float32."""


def names() -> list[str]:
    return list(_tests("archs").ARCHS)


def architecture(report: Report, name: str) -> None:
    """name: of tests/archs.py."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        with report.attempt(f"{name}: making it"):
            _tests("archs").build(name).save_pretrained(root / "base")
            _make_adapters(root)
            generator = torch.Generator().manual_seed(3)
            ids = torch.randint(3, 250, (4, PROMPT), generator=generator).tolist()
            mixes: list[list[tuple[str, float]]] = [
                [], [("lora", 1.0)], [("others", 1.0)], [("lora", 0.6), ("others", -0.5)],
            ]  # fmt: skip
            asked = [
                Asked(" + ".join(n for n, _ in mix) or "base", mix, tuple(prompt))
                for mix, prompt in zip(mixes, ids, strict=True)
            ]
            for quantize in QUANTIZED:
                what = f"{name} {quantize}"
                with report.attempt(what), _device() as gpu:
                    compare(
                        report, what, asked,
                        lambda b, eager: _engine(b, root, quantize, eager), gpu, TOKENS,
                        TOLERANCE,
                    )  # fmt: skip


def _make_adapters(root: Path) -> None:
    """In our own format: LoRA on every linear, and the other kinds in turn."""
    from deltaserve.adapters.base import ModuleKind
    from deltaserve.adapters.delta_file import write_delta
    from deltaserve.server.model import load

    torch.manual_seed(4)
    model = load(root / "base", dtype=torch.float32)
    shapes = {
        path: (spec.out_features, spec.in_features)
        for path, spec in model.spec.modules.items()
        if spec.kind is ModuleKind.LINEAR and not model.packer.refusal(path)
    }
    lora = {path: (_lora(*shape),) for path, shape in shapes.items()}
    others = {path: (_others(i, *shape),) for i, (path, shape) in enumerate(shapes.items())}
    write_delta(root / "lora", lora, kind="lora")
    write_delta(root / "others", others, kind="others")


def _lora(out: int, inner: int) -> Any:
    from deltaserve.kernels.primitives import LowRank

    return LowRank(torch.randn(3, inner) * 0.2, torch.randn(out, 3) * 0.2)


def _others(i: int, out: int, inner: int) -> Any:
    from deltaserve.kernels.primitives import Bias, Bit, Scale, SparseCsr, pack_signs

    match i % 5:
        case 0:
            signs = pack_signs(torch.rand(1, out, inner) < 0.5)
            return Bit(signs, torch.rand(1, out) * 0.3 / inner**0.5)
        case 1:
            kept = torch.rand(out, inner) < 0.1
            ends = torch.cat((torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)))
            values = torch.randn(int(kept.sum())) * 0.2
            return SparseCsr(ends, kept.nonzero()[:, 1].int(), values)
        case 2:
            return Scale(input=torch.rand(inner) + 0.5)
        case 3:
            return Scale(output=torch.rand(out) + 0.5)
        case _:
            return Bias(torch.randn(out) * 0.1)


@contextmanager
def _device() -> Iterator[Any]:
    """The GPU; without one, the interpreter on memory apart from the host's."""
    if ON_GPU:
        from deltaserve.kernels.gpu.backend import TritonBackend

        yield TritonBackend()
    else:
        with _tests("apart").backend() as found:
            yield found


@contextmanager
def _engine(backend: Any, root: Path, quantize: str, eager: bool) -> Iterator[Any]:
    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.model import load

    model = load(
        root / "base", dtype=torch.float32, quantize=quantize, group_size=GROUP, backend=backend
    )  # type: ignore[call-overload]
    config = EngineConfig(
        kv_cache_bytes=8 << 20, max_batch_tokens=64, block_size=8, max_sequences=SEQUENCES,
        enforce_eager=eager,
    )  # fmt: skip
    engine = make_engine(model, config, AdapterConfig(roots=(root,), bytes=64 << 20))
    engine.start()
    try:
        for name in ("lora", "others"):
            engine.adapters.load(name, str(root / name)).result(timeout=60)
        yield engine
    finally:
        engine.shutdown()


def _tests(module: str) -> Any:
    """A module of the tests, which have a small model of each architecture."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return __import__(module)
