# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMS norm, with what the launches of the linears after it want of its output (inputs_kernel.py):
the row is in registers here, so none of that costs another launch or reads it again."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.gpu.quantize_kernel import store_in_8_bits

# What a step with adapters wants, bits of `uses`.
TUNED = tl.constexpr(1)
SCALED = tl.constexpr(2)
TURNED = tl.constexpr(4)
BIASED = tl.constexpr(8)

NONE = tl.constexpr(1 << 30)
"""No column."""


@triton.jit
def listed(floats, offsets, v, k, inside, missing):
    """Columns k of the v-th of a list of vectors, by offsets in units of 16 bytes; `missing` where
    its offset is negative."""
    at = tl.load(offsets + v)
    inside = inside & (k >= tl.where(at < 0, NONE, 0))
    return tl.load(floats + at.to(tl.int64) * 4 + k, mask=inside, other=missing)


@triton.jit(do_not_specialize=["M", "TILES", "copies", "uses"])
def norm_kernel(
    x, residual, gain, normed, scaled, token_scale, sums, turned, biases, columns, arena_float,
    norm_float, offsets, los, his, strengths, bounds, mixes, mix_bounds, mix_offset, mix_strength,
    M, TILES, copies, uses, eps, offset,
    K: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, TOKENS: tl.constexpr, RESIDUAL: tl.constexpr, ADAPTERS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """grid (tokens, in whole tiles if something beside the norm is wanted). x: [M, K].

    RESIDUAL: x += residual [M, K] first, in place. normed [M, K] = ``x / sqrt(mean(x^2) + eps) *
    (offset + gain)``, in float32, rounded once. TUNED: a token's gain is ``gain + sum of w (g -
    gain)`` and ``sum of w b`` is added, over the gains g and then the biases b of its mix: mixes
    int32 [M], mix_bounds [2 (mixes + 1) + 1], vectors by offset in norm_float, none where it is
    negative; mix 0 has none.
    BLOCK: K rounded up to a power of two. The rest is what inputs_kernel makes of x, here of
    normed; its tables are named as there. WHOLE: scaled int8 [parts, M, K rounded up to 128] is
    that copy, or normed, in 8 bits, with token_scale, and sums are of those (`store_in_8_bits`).
    copies: PARTS, or 1 if all parts share the scaled copy.
    Without ADAPTERS only STEP and WHOLE count; with them what is made is chosen when it runs, so
    that one compiled form serves every mix.
    """
    MP = TILES * TOKENS
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < K
    seen = k < tl.where(row < M, K, 0)
    place = row.to(tl.int64) * K + k
    g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    if ADAPTERS:  # tables of the step, which no launch before writes
        mix = tl.load(mixes + row, mask=(row < M) & ((uses & TUNED) != 0), other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + place, mask=seen, other=0.0).to(tl.float32)
        total = value.to(x.dtype.element_ty)
        tl.store(x + place, total, mask=seen)
        value = total.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / K + eps)
    if ADAPTERS:
        bias, base = tl.zeros((BLOCK,), tl.float32), g
        mix = mix_bounds + mix * 2
        first = tl.load(mix, mask=(uses & TUNED) != 0, other=0)
        middle = tl.load(mix + 1, mask=(uses & TUNED) != 0, other=0)
        last = tl.load(mix + 2, mask=(uses & TUNED) != 0, other=0)
        for v in range(first, middle):
            own = listed(norm_float, mix_offset, v, k, inside, base)
            g += tl.load(mix_strength + v) * (own - base)
        for v in range(middle, last):
            own = listed(norm_float, mix_offset, v, k, inside, 0.0)
            bias += tl.load(mix_strength + v) * own
        value = value * (offset + g) + bias
    else:
        value *= offset + g
    y = tl.where(seen, value, 0.0).to(x.dtype.element_ty)
    tl.store(normed + place, y, mask=seen)
    if ADAPTERS:
        if uses & TURNED:
            tl.store(turned + k * MP + row, y, mask=inside)
        if uses & BIASED:
            chunks = tl.reshape(y.to(tl.float32), (BLOCK // 128, 128))
            chunk = tl.arange(0, BLOCK // 128)
            total = tl.sum(chunks * tl.load(columns + tl.arange(0, 128))[None, :], axis=1)
            tl.store(biases + chunk * MP + row, total, mask=chunk * 128 < K)
    for part in range(copies):
        copy = y
        if ADAPTERS:
            if uses & SCALED:
                f = tl.full((BLOCK,), 1.0, tl.float32)
                tile = row // TOKENS * PARTS + part
                for v in range(tl.load(bounds + tile), tl.load(bounds + tile + 1)):
                    if (row >= tl.load(los + v)) & (row < tl.load(his + v)):
                        s = arena_float + tl.load(offsets + v).to(tl.int64) * 4
                        s = tl.load(s + k, mask=inside, other=1.0)
                        f += tl.load(strengths + v) * (s - 1.0)
                copy = (y.to(tl.float32) * f).to(x.dtype.element_ty)
                if not WHOLE:
                    tl.store(scaled + (part * M).to(tl.int64) * K + place, copy, mask=seen)
        if WHOLE:
            store_in_8_bits(
                copy.to(tl.float32), scaled, token_scale, sums, row, part, M, MP, K, BLOCK, STEP
            )
        elif STEP > 0:
            STEPS: tl.constexpr = (K + STEP - 1) // STEP
            at = tl.arange(0, BLOCK // STEP)
            pieces = tl.reshape(copy.to(tl.float32), (BLOCK // STEP, STEP))
            p = sums + (part * STEPS + at) * MP + row
            tl.store(p, tl.sum(pieces, axis=1), mask=at < STEPS)
