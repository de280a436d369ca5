# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What a group's launches want of its input beside x itself: copies scaled or in another order,
sums over the steps of a base with 4-bit weights, x turned for sparse slices, the biases of 1-bit
deltas. Where the kernel that makes x does this, or some of it, nothing is launched, or less is left
to do here."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "TILES"])
def inputs_kernel(
    x, scaled, sums, given, turned, biases, order, columns, arena_float, offsets, los, his,
    strengths, bounds, M, TILES,
    K: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr,
    BT: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr, BIASED: tl.constexpr,
    GIVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """grid (blocks of BT tokens, chunks of 128 columns, parts). x: [M, K].

    order: int32 [K] or None; column k of what the base is given is column order[k] of x.
    SCALED: scaled [parts, M, K] = x times ``1 + sum of w (s - 1)`` of each token's input vectors.
    It is written for an order too.
    STEP: unless it is 0, sums float32 [parts, K / STEP, MP] of what the base is given, over STEP
    columns each; GIVEN: tokens without input vectors keep those of given [K / STEP, MP], the sums
    that whoever made x took in an order of his own: a base row must not depend on its neighbours.
    TURNED: turned [K, MP] of x. BIASED: biases float32 [K / 128, MP], the sums of x times what the
    columns of 1-bit deltas come with, columns float32 [128].
    """
    MP = TILES * TOKENS
    block, chunk, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block * BT + tl.arange(0, BT)
    at = tl.arange(0, 128)
    k = chunk * 128 + at
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    seen = (m < M)[:, None] & (k < K)[None, :]
    place = m[:, None] * K + k[None, :]
    value = tl.load(x + place, mask=seen, other=0.0)
    if part == 0:
        if TURNED:
            tl.store(turned + k[None, :] * MP + m[:, None], value, mask=(k < K)[None, :])
        if BIASED:
            total = tl.sum(value.to(tl.float32) * tl.load(columns + at)[None, :], axis=1)
            tl.store(biases + chunk * MP + m, total)
    if order is not None:
        k = tl.load(order + k, mask=k < K, other=K)
        value = tl.load(x + m[:, None] * K + k[None, :], mask=seen, other=0.0)
    changed = m < 0
    if SCALED:
        f = tl.full((BT, 128), 1.0, tl.float32)
        tile = (block * BT // TOKENS) * PARTS + part
        for v in range(tl.load(bounds + tile), tl.load(bounds + tile + 1)):
            s = arena_float + tl.load(offsets + v).to(tl.int64) * 4
            s = tl.load(s + k, mask=k < K, other=1.0)
            own = (m >= tl.load(los + v)) & (m < tl.load(his + v))
            f += tl.where(own[:, None], (tl.load(strengths + v) * (s - 1.0))[None, :], 0.0)
            changed = changed | own
        value = (value.to(tl.float32) * f).to(x.dtype.element_ty)
    if SCALED or order is not None:
        tl.store(scaled + (part * M).to(tl.int64) * K + place, value, mask=seen)
    if STEP > 0:
        PIECES: tl.constexpr = 128 // STEP
        STEPS: tl.constexpr = (K + STEP - 1) // STEP
        total = tl.sum(tl.reshape(value.to(tl.float32), (BT, PIECES, STEP)), axis=2)
        step = chunk * PIECES + tl.arange(0, PIECES)
        whole = (step < STEPS)[None, :]
        if GIVEN:
            kept = tl.load(given + step[None, :] * MP + m[:, None], mask=whole, other=0.0)
            total = tl.where(changed[:, None], total, kept)
        tl.store(sums + (part * STEPS + step)[None, :] * MP + m[:, None], total, mask=whole)
