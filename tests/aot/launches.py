"""Run as a script: serves many kinds of adapters to Triton's compiler, with no GPU behind it, and
prints how many kernels were compiled before the first one, how many by all of them, and how many
by a step of a size that nothing was compiled for."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
if __name__ == "__main__":  # and not in the processes that compile for it
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
import triton
from triton.backends.compiler import GPUTarget

from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.base import GpuLinear, make_linear
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.precompile import precompile
from deltaserve.kernels.gpu.variants import GroupSpec, of_group
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    LowRank,
    Primitive,
    Replace,
    Scale,
    SparseCols,
    SparseCsr,
    SparseRows,
)
from deltaserve.kernels.segments import Segments

INNER, OUTS, DTYPE = 256, (128, 64), torch.bfloat16
HOST = torch.device("cpu")


class Driver:
    """A GPU that takes kernels and never runs one."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def compile_only() -> None:
    run = triton.runtime.jit.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.jit.JITFunction.run = warm
    triton.runtime.driver.set_active(Driver())
    device.overlaps = lambda _: True


def compiled() -> int:
    cache = os.environ["TRITON_CACHE_DIR"]
    return sum(name.endswith(".cubin") for _, _, files in os.walk(cache) for name in files)


def primitives(out: int) -> list[Primitive]:
    index = torch.tensor([3, 5])
    ends = torch.arange(out + 1)
    return [
        LowRank(torch.randn(1, INNER), torch.randn(out, 1)),
        LowRank(torch.randn(100, INNER), torch.randn(out, 100)),
        Bit(torch.zeros(2, out, INNER // 8, dtype=torch.uint8), torch.ones(2, out)),
        SparseCsr(ends, torch.zeros(out, dtype=torch.int32), torch.ones(out)),
        SparseRows(index, torch.randn(2, INNER)),
        SparseCols(index, torch.randn(out, 2)),
        Scale(input=torch.ones(INNER)),
        Scale(output=torch.ones(out)),
        Bias(torch.ones(out)),
        Replace(torch.randn(out, INNER)),
    ]


def main() -> None:
    spec = GroupSpec("qkv", "int4", INNER, OUTS, dtype=DTYPE)
    precompile(list(of_group(spec, (1, 16), 90)), 90)
    before = compiled()
    compile_only()
    base = make_linear(
        torch.randn(sum(OUTS), INNER), None, dtype=DTYPE, quantize="int4", device=HOST
    )
    deltas = GpuLinearDeltas(INNER, OUTS, DTYPE, device=HOST)
    kinds = len(primitives(64))
    for slot in range(kinds):
        parts = {p: (primitives(out)[slot],) for p, out in enumerate(OUTS) if slot % 2 or p}
        deltas.install(slot, deltas.prepare(parts))
    for tokens in (1, 3, 9, 16):
        serve(deltas, base, tokens, kinds)
    after = compiled()
    serve(deltas, base, 17, kinds)  # a size that nothing was compiled for
    print(before, after - before, compiled() - after)


def serve(deltas: GpuLinearDeltas, base: GpuLinear, tokens: int, kinds: int) -> None:
    """Steps of so many tokens: every kind alone, mixed, none."""
    mixes = [((i % kinds, 1.0),) if i % 5 else () for i in range(tokens)]
    for segments in (
        Segments.of(mixes),
        Segments([], tokens),
        Segments([(0, 1, ((1, 0.5), (2, 0.5)))], tokens),
        *(Segments([(0, tokens, ((slot, 1.0),))], tokens) for slot in range(kinds)),
    ):
        deltas.forward(torch.zeros(tokens, INNER, dtype=DTYPE), base, segments)


if __name__ == "__main__":
    main()
