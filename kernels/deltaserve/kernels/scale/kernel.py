# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Scale and Bias in Triton: in the base GEMM's epilogue, and on its inputs before it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factors(
    acc, arena_float, offsets, los, his, strengths, first, last, m, n, live,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] times ``1 + sum of w (s - 1)`` of each token's vectors first..last; n: the
    tile's rows within the module."""
    if first < last:
        f = tl.full((BN, BM), 1.0, tl.float32)
        for v in range(first, last):
            s = tl.load(
                arena_float + tl.load(offsets + v).to(tl.int64) * 4 + n, mask=live, other=1.0
            )
            own = (m >= tl.load(los + v)) & (m < tl.load(his + v))
            f += tl.where(own[None, :], (tl.load(strengths + v) * (s - 1.0))[:, None], 0.0)
        acc *= f
    return acc


@triton.jit
def biases(
    acc, arena_float, offsets, los, his, strengths, first, last, m, n, live,
):  # fmt: skip
    """acc [BN, BM] plus ``sum of w bias`` of each token's vectors first..last."""
    for v in range(first, last):
        b = tl.load(arena_float + tl.load(offsets + v).to(tl.int64) * 4 + n, mask=live, other=0.0)
        own = (m >= tl.load(los + v)) & (m < tl.load(his + v))
        acc += tl.where(own[None, :], (tl.load(strengths + v) * b)[:, None], 0.0)
    return acc
