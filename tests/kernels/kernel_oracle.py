"""Random primitives, and what they mean in float64: written apart from the code under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    GatedLowRank,
    LowRank,
    Primitive,
    Replace,
    ReplaceRows,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
    pack_signs,
    unpack_signs,
)
from deltaserve.kernels.segments import Segments

FAMILIES = ("low", "bit", "csr", "rows", "cols", "blocks", "bias", "output", "input", "replace")


def random_primitive(kind: str, out: int, inner: int, rank: int = 3) -> Primitive:
    """A primitive that changes outputs by about as much as they are."""
    match kind:
        case "low":
            scale = 0.5 + float(torch.rand(()))
            return LowRank(torch.randn(rank, inner) / inner**0.5, torch.randn(out, rank), scale)
        case "gated":
            experts = 1 + rank % 4
            gate, a = torch.randn(experts, inner) / inner**0.5, torch.randn(experts * rank, inner)
            return GatedLowRank(gate, a / inner**0.5, torch.randn(out, experts * rank), 0.7)
        case "bit":
            planes = 1 + rank % 2
            signs = pack_signs(torch.rand(planes, out, inner) < 0.5)
            return Bit(signs, torch.rand(planes, out) / inner**0.5)
        case "csr":
            mask = torch.rand(out, inner) < 0.15
            mask[out // 2] = False
            indptr = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)))
            return SparseCsr(indptr, mask.nonzero()[:, 1].int(), torch.randn(int(mask.sum())))
        case "rows":
            index = torch.randperm(out)[: 1 + out // 4]
            return SparseRows(index, torch.randn(len(index), inner) / inner**0.5)
        case "cols":
            index = torch.randperm(inner)[: 1 + inner // 4]
            return SparseCols(index, torch.randn(out, len(index)))
        case "blocks":
            high, wide = smallest_divisor(out), smallest_divisor(inner)
            every = torch.cartesian_prod(torch.arange(out // high), torch.arange(inner // wide))
            index = every[torch.randperm(len(every))[: 1 + len(every) // 20]]
            return SparseBlocks(index, torch.randn(len(index), high, wide) / inner**0.25)
        case "bias":
            return Bias(torch.randn(out))
        case "output":
            return Scale(output=torch.rand(out) + 0.5)
        case "input":
            return Scale(input=torch.rand(inner) + 0.5)
        case "replace":
            return Replace(torch.randn(out, inner) / inner**0.5)
        case "replace_rows":
            index = torch.randperm(out)[: 1 + out // 4]
            return ReplaceRows(index, torch.randn(len(index), inner) / inner**0.5)
    raise AssertionError(kind)


def smallest_divisor(n: int) -> int:
    return next((d for d in range(2, n + 1) if n % d == 0), 1)


def dense_delta(p: Primitive, weight: Tensor) -> Tensor:
    """float64 change of the weight [out, in] that an additive or replacing primitive makes."""
    d = torch.zeros_like(weight, dtype=torch.float64)
    match p:
        case LowRank(a, b, scale):
            return b.double() @ a.double() * scale
        case Bit(signs, scale):
            planes = unpack_signs(signs, weight.shape[1]).double()
            return torch.einsum("po,poi->oi", scale.double(), planes)
        case SparseCsr(indptr, indices, values):
            for row in range(len(indptr) - 1):
                here = slice(int(indptr[row]), int(indptr[row + 1]))
                d[row, indices[here].long()] = values[here].double()
        case SparseRows(index, values):
            d[index] = values.double()
        case SparseCols(index, values):
            d[:, index] = values.double()
        case SparseBlocks(index, values):
            _, h, w = values.shape
            for (i, j), block in zip(index.tolist(), values, strict=True):
                d[i * h : i * h + h, j * w : j * w + w] = block.double()
        case Replace(new):
            return new.double() - weight.double()
        case ReplaceRows(index, values):
            d[index] = values.double() - weight[index].double()
    return d


def gated_delta(p: GatedLowRank, x: Tensor) -> Tensor:
    """Expert by expert, token by token, in float64."""
    rank = len(p.a) // len(p.gate)
    y = torch.zeros(len(x), len(p.b)).double()
    for t, token in enumerate(x):
        odds = [float(torch.exp(g.double() @ token)) for g in p.gate]
        for i, odd in enumerate(odds):
            own = slice(i * rank, i * rank + rank)
            hidden = p.a[own].double() @ token
            y[t] += p.scale * odd / sum(odds) * (p.b[:, own].double() @ hidden)
    return y


def served(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Mapping[int, Sequence[Primitive]],
    segments: Segments,
    read: Callable[[Tensor], Tensor] = Tensor.double,
) -> Tensor:
    """float64 [T, out] of one linear: every mix as one dense weight. read: what the base's product
    makes of its inputs, and of nobody else's."""
    w64, x64 = weight.double(), x.double()
    b64 = torch.zeros(len(w64)).double() if bias is None else bias.double()
    y = read(x64) @ w64.T + b64
    for start, end, mix in segments.runs:
        output, inputs = torch.ones(len(w64)).double(), torch.ones(w64.shape[1]).double()
        delta, extra = torch.zeros_like(w64), torch.zeros_like(b64)
        gone = torch.zeros(len(w64)).double()
        gated = torch.zeros(end - start, len(w64)).double()
        for slot, strength in mix:
            for p in adapters.get(slot, ()):
                if isinstance(p, Scale):
                    if p.output is not None:
                        output += strength * (p.output.double() - 1)
                    if p.input is not None:
                        inputs += strength * (p.input.double() - 1)
                elif isinstance(p, GatedLowRank):
                    gated += strength * gated_delta(p, x64[start:end])
                elif isinstance(p, Bias):
                    extra += strength * p.bias.double()
                elif isinstance(p, Replace):
                    gone += strength
                    delta += strength * p.weight.double()
                elif isinstance(p, ReplaceRows):
                    gone[p.index] += strength
                    delta[p.index] += strength * p.values.double()
                else:
                    delta += strength * dense_delta(p, weight)
        own = x64[start:end]
        y[start:end] = read(own * inputs) @ (output[:, None] * w64).T + own @ delta.T
        y[start:end] += b64 + extra + gated - read(own) @ (gone[:, None] * w64).T
    return y


def in_8_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 x, rounded to `dtype`, as one scale a token and whole numbers in -127..127 hold it:
    rounded to nearest once, of the exact product with the float32 inverse of the scale."""
    given = x.to(dtype).float()
    top = given.abs().amax(-1, keepdim=True)
    scale = torch.where(top > 1e-30, top / 127, torch.ones_like(top))
    return (given.double() * (1 / scale).double()).round() * scale.double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values; NaN if any is NaN."""
    error = found.double() - expected.double()
    return float(error.square().mean().sqrt() / expected.double().square().mean().sqrt())
