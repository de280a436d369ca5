# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What a group's launches want of its input beside x itself: scaled copies, sums over the steps
of a base with 4-bit weights, and x turned for sparse slices. In the fused decoder path the kernel
that makes x does this; here it is a launch of its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "TILES"])
def inputs_kernel(
    x, scaled, sums, turned, arena_float, offsets, los, his, strengths, bounds, M, TILES,
    K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    BT: tl.constexpr, SUMS: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """grid (blocks of BT tokens, groups of columns, parts). x: [M, K].

    SCALED: scaled [parts, M, K] = x times ``1 + sum of w (s - 1)`` of each token's input vectors.
    SUMS: sums float32 [parts, groups, MP] of what the base is given. TURNED: turned [K, MP] of x.
    """
    MP = TILES * TOKENS
    block, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STEP: tl.constexpr = GROUP if GROUP < 128 else 128
    m = block * BT + tl.arange(0, BT)
    at = tl.arange(0, STEP)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((BT,), tl.float32)
    tile = (block * BT // TOKENS) * PARTS + part
    for k in range(group * GROUP, tl.minimum(group * GROUP + GROUP, K), STEP):
        seen = (m < M)[:, None] & (k + at < K)[None, :]
        place = m[:, None] * K + (k + at)[None, :]
        value = tl.load(x + place, mask=seen, other=0.0)
        if TURNED:
            if part == 0:
                turn = turned + (k + at)[None, :] * MP + m[:, None]
                tl.store(turn, value, mask=(k + at < K)[None, :])
        if SCALED:
            f = tl.full((BT, STEP), 1.0, tl.float32)
            for v in range(tl.load(bounds + tile), tl.load(bounds + tile + 1)):
                s = arena_float + tl.load(offsets + v).to(tl.int64) * 4
                s = tl.load(s + k + at, mask=k + at < K, other=1.0)
                own = (m >= tl.load(los + v)) & (m < tl.load(his + v))
                f += tl.where(own[:, None], (tl.load(strengths + v) * (s - 1.0))[None, :], 0.0)
            value = (value.to(tl.float32) * f).to(x.dtype.element_ty)
            tl.store(scaled + (part * M).to(tl.int64) * K + place, value, mask=seen)
        total += tl.sum(value.to(tl.float32), axis=1)
    if SUMS:
        groups: tl.constexpr = (K + GROUP - 1) // GROUP
        tl.store(sums + (part * groups + group) * MP + m, total)
