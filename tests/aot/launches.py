"""Run as a script: serves many kinds of adapters to Triton's compiler, with no GPU behind it, and
prints how many kernels were compiled before the first one, how many by all of them, and how many
by a step of a size that nothing was compiled for. With the argument "layer", of a decoder layer,
else of one group of linears."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
if __name__ == "__main__":  # and not in the processes that compile for it
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
import triton
from triton.backends.compiler import GPUTarget

from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.step import How, Span
from deltaserve.kernels.decoder import LayerParts, Linear, Norm
from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.base import GpuLinear, make_linear
from deltaserve.kernels.gpu.layer import GpuLayer
from deltaserve.kernels.gpu.layer_variants import LayerSpec, of_layer
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.precompile import precompile
from deltaserve.kernels.gpu.variants import GroupSpec, of_group
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    GatedLowRank,
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
INT4 = ("int4", "float")
FORMATS = {INT4: "int4", ("int8", "int8"): "w8a8", ("int4", "int8"): "w4a8"}
"""(weights, activations) -> what `GroupSpec` calls it."""


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


def primitives(out: int, inner: int = INNER) -> list[Primitive]:
    index = torch.tensor([3, 5])
    ends = torch.arange(out + 1)
    return [
        LowRank(torch.randn(1, inner), torch.randn(out, 1)),
        LowRank(torch.randn(100, inner), torch.randn(out, 100)),
        GatedLowRank(torch.randn(4, inner), torch.randn(12, inner), torch.randn(out, 12)),
        Bit(torch.zeros(2, out, inner // 8, dtype=torch.uint8), torch.ones(2, out)),
        SparseCsr(ends, torch.zeros(out, dtype=torch.int32), torch.ones(out)),
        SparseRows(index, torch.randn(2, inner)),
        SparseCols(index, torch.randn(out, 2)),
        Scale(input=torch.ones(inner)),
        Scale(output=torch.ones(out)),
        Bias(torch.ones(out)),
        Replace(torch.randn(out, inner)),
    ]


KINDS = len(primitives(64))


def layer() -> None:
    """Every kind of adapter on every group, and on the norms."""
    heads, kv_heads, dim = 4, 2, 64
    sizes = ((256, (256, 128, 128)), (256, (256,)), (256, (384, 384)), (384, (256,)))
    gated, added = {"activation": "silu"}, {"residual": True}
    options: tuple[dict[str, Any], ...] = ({}, added, gated, added)
    forms = (("int8", "int8"), INT4, INT4, INT4)
    specs = [
        GroupSpec(f"group {i}", FORMATS[form], inner, outs, dtype=DTYPE, **own)
        for i, ((inner, outs), own, form) in enumerate(zip(sizes, options, forms, strict=True))
    ]
    spec = LayerSpec(
        (specs[0], specs[1], specs[2], specs[3]), heads, kv_heads, dim, dim, head_norms=True
    )
    precompile(list(of_layer(spec, (4,), 90)), 90)
    before = compiled()
    compile_only()
    space, linears = Workspace(HOST), []
    for (inner, outs), form in zip(sizes, forms, strict=True):
        base = random_base(inner, outs, form)
        deltas = GpuLinearDeltas(inner, outs, DTYPE, device=HOST, workspace=space)
        for slot in range(KINDS):
            parts = {
                p: (primitives(out, inner)[slot],) for p, out in enumerate(outs) if slot % 2 or p
            }
            deltas.install(slot, deltas.prepare(parts))
        linears.append(Linear(deltas, base))
    norms = []
    for size in (256, 256, dim, dim):
        tuned = GpuNormDeltas(size, DTYPE, HOST)
        tuned.install(3, tuned.prepare((Replace(torch.ones(size)), Bias(torch.ones(size)))))
        norms.append(Norm(torch.ones(size, dtype=DTYPE), 1e-5, 0.0, tuned))
    parts_ = LayerParts(
        (norms[0], norms[1]), (linears[0], linears[1], linears[2], linears[3]), heads, kv_heads,
        dim, How(0.1, None, None, None), (norms[2], norms[3]),
    )  # fmt: skip
    made = GpuLayer(parts_, space)
    cache = tuple(torch.zeros(40, 16, kv_heads, dim, dtype=DTYPE) for _ in range(2))

    def run(tokens: int) -> None:
        cosine = torch.zeros(tokens, dim, dtype=DTYPE)
        long = [Span(599, 1, range(40))] + [Span(0, 1, [0])] * (tokens - 1)
        for spans in (long, [Span(0, tokens, [0, 1])]):
            step = GpuStep.of(spans, 16, HOST)
            for segments in steps(tokens):
                x = torch.zeros(tokens, 256, dtype=DTYPE)
                made.run(x, (cosine, cosine), (cache[0], cache[1]), step, segments)

    for tokens in (3, 4):
        run(tokens)
    after = compiled()
    run(17)
    print(before, after - before, compiled() - after)


def group() -> None:
    forms = INT4, ("int4", "int8")
    specs = [GroupSpec("qkv", FORMATS[form], INNER, OUTS, dtype=DTYPE) for form in forms]
    precompile([v for spec in specs for v in of_group(spec, (1, 16), 90)], 90)
    before = compiled()
    compile_only()
    deltas = GpuLinearDeltas(INNER, OUTS, DTYPE, device=HOST)
    for slot in range(KINDS):
        parts = {p: (primitives(out)[slot],) for p, out in enumerate(OUTS) if slot % 2 or p}
        deltas.install(slot, deltas.prepare(parts))
    bases = [random_base(INNER, OUTS, form) for form in forms]
    for base in bases:
        for tokens in (1, 3, 9, 16):
            serve(deltas, base, tokens)
    after = compiled()
    serve(deltas, bases[0], 17)  # a size that nothing was compiled for
    print(before, after - before, compiled() - after)


def random_base(inner: int, outs: Sequence[int], form: tuple[str, str]) -> GpuLinear:
    weight = torch.randn(sum(outs), inner)
    return make_linear(
        weight, None, dtype=DTYPE, quantize=form[0], activations=form[1], device=HOST
    )


def steps(tokens: int) -> list[Segments]:
    """Of so many tokens: every kind alone, mixed, none."""
    mixes = [((i % KINDS, 1.0),) if i % 5 else () for i in range(tokens)]
    return [
        Segments.of(mixes),
        Segments([], tokens),
        Segments([(0, 1, ((1, 0.5), (2, 0.5)))], tokens),
        *(Segments([(0, tokens, ((slot, 1.0),))], tokens) for slot in range(KINDS)),
    ]


def serve(deltas: GpuLinearDeltas, base: GpuLinear, tokens: int) -> None:
    for segments in steps(tokens):
        deltas.forward(torch.zeros(tokens, INNER, dtype=DTYPE), base, segments)


if __name__ == "__main__":
    layer() if sys.argv[1:] == ["layer"] else group()
