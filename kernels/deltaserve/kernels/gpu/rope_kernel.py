# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Rotary embedding of a step's queries and keys, and its keys and values into the cache."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.gpu.norm_kernel import listed


@triton.jit
def _put(out, row, keys, values, place, at, mask, turns, is_key, is_value):
    """One stretch of the columns of a tile of heads: back if it is turned, and into the cache."""
    tl.store(row + at, out, mask=mask & turns)
    tl.store(keys + place + at, out, mask=mask & is_key)
    tl.store(values + place + at, out, mask=mask & is_value)


@triton.jit
def _gain(
    gain, offset, floats, mixes, bounds, offsets, strengths, token, at, inside, TUNED: tl.constexpr
):
    """float32 gain and bias of one norm for a token, as in norm_kernel."""
    g = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros_like(g)
    if TUNED:
        mix = bounds + tl.load(mixes + token) * 2
        first, middle, last = tl.load(mix), tl.load(mix + 1), tl.load(mix + 2)
        base = g
        for v in range(first, middle):
            own = listed(floats, offsets, v, at, inside, base)
            g += tl.load(strengths + v) * (own - base)
        for v in range(middle, last):
            bias += tl.load(strengths + v) * listed(floats, offsets, v, at, inside, 0.0)
    return offset + g, bias


@triton.jit
def _normed(
    x, r, at, inside, asked, token, offset,
    gain, floats, mixes, bounds, offsets, strengths,
    key_gain, key_floats, key_mixes, key_bounds, key_offsets, key_strengths,
    TUNED: tl.constexpr,
):  # fmt: skip
    """A stretch of the columns of a tile of heads, queries where asked, times r and the gain."""
    q, q_bias = _gain(
        gain, offset, floats, mixes, bounds, offsets, strengths, token, at, inside, TUNED
    )
    k, k_bias = _gain(
        key_gain, offset, key_floats, key_mixes, key_bounds, key_offsets, key_strengths, token, at,
        inside, TUNED,
    )  # fmt: skip
    y = x * r * tl.where(asked, q[None, :], k[None, :])
    return y + tl.where(asked, q_bias[None, :], k_bias[None, :])


@triton.jit(do_not_specialize=["cells", "block_step", "eps", "offset"])
def rope_kernel(
    qkv, cosine, sine, keys, values, block_step, cells, eps, offset,
    gain, floats, mixes, bounds, offsets, strengths,
    key_gain, key_floats, key_mixes, key_bounds, key_offsets, key_strengths,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr,
    TILE: tl.constexpr, HALVES: tl.constexpr, REST: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STEP: tl.constexpr, NORMED: tl.constexpr, TUNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """grid (tokens, tiles of TILE heads). qkv: [M, HEADS + 2 KV_HEADS, DIM], its queries and keys
    are turned in place: of a head the first TURNED elements, in halves (a, b) ->
    ``(a cos - b sin, b cos + a sin)``, in float32, rounded once. cosine, sine: [M, TURNED]. keys,
    values: blocks [BLOCK_SIZE, KV_HEADS, DIM], block_step STEP elements from one to the next.
    cells: integers [M], -1 writes nothing.
    NORMED: each head goes through an RMS norm before it is turned, of gains ``offset + gain`` and
    ``offset + key_gain`` [DIM]; TUNED: as in norm_kernel, with tables for either.
    HALVES, REST: TURNED / 2 and DIM - TURNED rounded up to powers of two; REST 0 for none.
    """
    HALF: tl.constexpr = TURNED // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    turns = head < HEADS + KV_HEADS
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    known = turns | is_value
    i, j = tl.arange(0, HALVES), TURNED + tl.arange(0, REST if REST > 0 else 1)
    half, rest = (i < HALF)[None, :], (j < DIM)[None, :]
    row = qkv + token * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM
    angle = token * TURNED + i
    c1 = tl.load(cosine + angle, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sine + angle, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cosine + angle + HALF, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sine + angle + HALF, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    cell = tl.load(cells + token).to(tl.int64)
    kept = cell >= 0
    is_key = turns & (head >= tl.where(kept, HEADS, HEADS + KV_HEADS))
    place = cell % BLOCK_SIZE * KV_HEADS + head - tl.where(is_value, HEADS + KV_HEADS, HEADS)
    place = cell // BLOCK_SIZE * (block_step * STEP) + place * DIM
    is_value = is_value & (head < tl.where(kept, HEADS + 2 * KV_HEADS, 0))
    a = tl.load(row + i[None, :], mask=known & half, other=0.0).to(tl.float32)
    b = tl.load(row + HALF + i[None, :], mask=known & half, other=0.0).to(tl.float32)
    if REST > 0:
        t = tl.load(row + j[None, :], mask=known & rest, other=0.0).to(tl.float32)
    if NORMED:
        total = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if REST > 0:
            total += tl.sum(t * t, axis=1)
        r = tl.rsqrt(total / DIM + eps)[:, None]
        asked = head < HEADS
        a = tl.where(turns, _normed(
            a, r, i, i < HALF, asked, token, offset,
            gain, floats, mixes, bounds, offsets, strengths,
            key_gain, key_floats, key_mixes, key_bounds, key_offsets, key_strengths, TUNED,
        ), a)  # fmt: skip
        b = tl.where(turns, _normed(
            b, r, HALF + i, i < HALF, asked, token, offset,
            gain, floats, mixes, bounds, offsets, strengths,
            key_gain, key_floats, key_mixes, key_bounds, key_offsets, key_strengths, TUNED,
        ), b)  # fmt: skip
        if REST > 0:
            t = tl.where(turns, _normed(
                t, r, j, j < DIM, asked, token, offset,
                gain, floats, mixes, bounds, offsets, strengths,
                key_gain, key_floats, key_mixes, key_bounds, key_offsets, key_strengths, TUNED,
            ), t)  # fmt: skip
    T: tl.constexpr = qkv.dtype.element_ty
    out = tl.where(turns, a * c1 - b * s1, a).to(T)
    _put(out, row, keys, values, place, i[None, :], half, turns, is_key, is_value)
    out = tl.where(turns, b * c2 + a * s2, b).to(T)
    _put(out, row, keys, values, place, HALF + i[None, :], half, turns, is_key, is_value)
    if REST > 0:
        _put(t.to(T), row, keys, values, place, j[None, :], rest, turns, is_key, is_value)
