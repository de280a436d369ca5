"""Groups of linears, decoder layers and attention that serve steps to Triton with no GPU behind it:
every launch gets as far as asking for its compiled form."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from deltaserve.kernels.attention import gpu as attention
from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.step import How, Span
from deltaserve.kernels.decoder import LayerParts, Linear, Norm
from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.base import GpuLinear, make_linear
from deltaserve.kernels.gpu.layer import GpuLayer
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
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

ARCH, BLOCK = 90, 16
HOST = torch.device("cpu")
LOW, GATED, BITS, SPARSE, SCALED, APART, NORMS = range(7)
"""Slots; those after are of further kinds. SCALED: inputs alike for all modules of a group; APART:
each its own. NORMS: of norms alone."""
OTHERS = range(NORMS + 1, NORMS + 7)


class Driver:
    """A GPU that takes kernels and never runs one."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def be_served() -> None:
    """From now on there is a GPU of `ARCH`, whose launches compile and no more."""
    run = triton.runtime.jit.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.jit.JITFunction.run = warm
    triton.runtime.driver.set_active(Driver())
    device.overlaps = lambda _: True
    attention.multiprocessors = lambda _: 132


def adapters(inner: int, outs: tuple[int, ...]) -> Iterator[dict[int, tuple[Primitive, ...]]]:
    """What is in each slot of a group, by module."""
    index, like = torch.tensor([3, 5]), Scale(input=torch.ones(inner))
    for i, kind in enumerate((LOW, GATED, BITS, SPARSE, SCALED, APART, NORMS, *OTHERS)):
        found: dict[int, tuple[Primitive, ...]] = {}
        for part, out in enumerate(outs):
            own: tuple[Primitive | None, ...] = (
                LowRank(torch.randn(100, inner), torch.randn(out, 100)),
                GatedLowRank(torch.randn(4, inner), torch.randn(12, inner), torch.randn(out, 12)),
                Bit(torch.zeros(2, out, inner // 8, dtype=torch.uint8), torch.ones(2, out)),
                SparseCsr(torch.arange(out + 1), torch.zeros(out).int(), torch.ones(out)),
                like,
                Scale(input=torch.full((inner,), 2.0 + part)),
                None,
                LowRank(torch.randn(1, inner), torch.randn(out, 1)) if part else None,
                SparseRows(index, torch.randn(2, inner)),
                SparseCols(index, torch.randn(out, 2)),
                Scale(output=torch.ones(out)),
                Bias(torch.ones(out)),
                Replace(torch.randn(out, inner)),
            )
            primitive = own[i]
            if primitive is not None:
                found[part] = (primitive,)
        assert kind == i
        yield found


def mixes(tokens: int) -> Iterator[Segments]:
    """Steps of so many tokens: none, every kind alone, all that may be wanted of inputs in every
    combination, as many adapters as tokens."""
    yield Segments([], tokens)
    for slot in (LOW, GATED, NORMS, *OTHERS):
        yield Segments([(0, tokens, ((slot, 1.0),))], tokens)
    for some in product(((), (SCALED,), (APART,)), ((), (BITS,)), ((), (SPARSE,))):
        slots = [slot for found in some for slot in found]
        yield Segments([(0, 1, tuple((slot, 0.5) for slot in (LOW, *slots)))], tokens)
    yield Segments.of([((slot % (SCALED + 1), 1.0),) if slot % 7 else () for slot in range(tokens)])


class Group:
    """A group of linears with adapters. base: on the host. how: as of `make_linear`."""

    def __init__(
        self, inner: int, outs: tuple[int, ...], dtype: torch.dtype, *, bias: bool = False,
        ordered: bool = False, whole: bool = True, space: Workspace | None = None, **how: Any,
    ) -> None:  # fmt: skip
        weight = torch.randn(sum(outs), inner)
        given = torch.ones(sum(outs)) if bias else None
        base = make_linear(weight, given, dtype=dtype, device=HOST, **how)
        if ordered or not whole:
            held = base.held()
            if ordered:
                held["order"] = torch.randperm(inner)
            if not whole:
                held["zero"] = held["zero"] + 0.25
            base = GpuLinear(held, base.format, dtype, base.group_size, HOST)
        self.base, self.dtype = base, dtype
        self.deltas = GpuLinearDeltas(inner, outs, dtype, device=HOST, workspace=space)
        for slot, parts in enumerate(adapters(inner, outs)):
            self.deltas.install(slot, self.deltas.prepare(parts))

    def serve(self, tokens: int) -> None:
        """Every mix, and the base by itself."""
        x = torch.zeros(tokens, self.base.in_features, dtype=self.dtype)
        self.base(x)
        for segments in mixes(tokens):
            self.deltas.forward(x, self.base, segments)


class Layer:
    """A decoder layer with adapters on everything. how: of its linears. turned: of a head."""

    HEADS, KV_HEADS, DIM, HIDDEN, INNER = 4, 2, 64, 256, 384

    def __init__(
        self, dtype: torch.dtype, *, head_norms: bool = False, joined: bool = False,
        window: int | None = None, softcap: float | None = None, **how: Any,
    ) -> None:  # fmt: skip
        h, inner, dim = self.HIDDEN, self.INNER, self.DIM
        qkv = (self.HEADS * dim, self.KV_HEADS * dim, self.KV_HEADS * dim)
        up = (2 * inner,) if joined else (inner, inner)
        space = Workspace(HOST)
        found = [
            Group(i, outs, dtype, space=space, **how)
            for i, outs in ((h, qkv), (qkv[0], (h,)), (h, up), (inner, (h,)))
        ]
        linears = [Linear(group.deltas, group.base) for group in found]
        norms = []
        for size in (h, h, dim, dim):
            tuned = GpuNormDeltas(size, dtype, HOST)
            tuned.install(NORMS, tuned.prepare((Replace(torch.ones(size)),)))
            norms.append(Norm(torch.ones(size, dtype=dtype), 1e-5, 0.0, tuned))
        self.dtype = dtype
        self.layer = GpuLayer(
            LayerParts(
                (norms[0], norms[1]), (linears[0], linears[1], linears[2], linears[3]), self.HEADS,
                self.KV_HEADS, dim, How(0.1, window, softcap, None),
                (norms[2], norms[3]) if head_norms else None,
            ),
            space,
        )  # fmt: skip
        self.cache = tuple(
            torch.zeros(40, BLOCK, self.KV_HEADS, dim, dtype=dtype) for _ in range(2)
        )

    def serve(self, tokens: int) -> None:
        """Every mix in a step of decoding sequences; the base with long ones, and with a prompt."""
        x = torch.zeros(tokens, self.HIDDEN, dtype=self.dtype)
        turn = torch.zeros(tokens, self.DIM, dtype=self.dtype)
        short = [Span(0, 1, [0])] * tokens
        for spans in ([Span(599, 1, range(40)), *short[1:]], [Span(3, tokens, range(40))]):
            step, none = GpuStep.of(spans, BLOCK, HOST), Segments([], tokens)
            self.layer.run(x, (turn, turn), (self.cache[0], self.cache[1]), step, none)
        step = GpuStep.of(short, BLOCK, HOST)
        for segments in mixes(tokens):
            self.layer.run(x, (turn, turn), (self.cache[0], self.cache[1]), step, segments)
