# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Bit in Triton: ``y = sum of scale (signs x)`` of a tile of rows, straight from the words of
bit/words.py; nothing is unpacked to memory."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.base.unpack_kernel import bits_over, halves, over

# What a bit of a word becomes (bit/words.py): the bit over a base number.
BF16_15 = bits_over(0x80008000, 0x3F803F80)
BF16_6 = bits_over(0x00400040, 0x40804080)
BF16_5 = bits_over(0x00200020, 0x41004100)
F16_15 = bits_over(0x80008000, 0x3C003C00)
F16_9 = bits_over(0x02000200, 0x44004400)
F16_8 = bits_over(0x01000100, 0x48004800)


@triton.jit
def sign(w, PACKED: tl.constexpr, ASM: tl.constexpr, MASK: tl.constexpr, BASE: tl.constexpr):
    """Pairs from one bit of the words' halves."""
    if PACKED:
        p = over(w, ASM)
    else:
        p = (w & MASK) | BASE
    return p


@triton.jit
def four(w, DT: tl.constexpr, PACKED: tl.constexpr):
    """Pairs from the four bits that serve: 15, 14, and 6 and 5 in bf16, 9 and 8 in f16."""
    if DT == tl.bfloat16:
        first = sign(w, PACKED, BF16_15, -2147450880, 0x3F803F80)
        third = sign(w, PACKED, BF16_6, 0x00400040, 0x40804080)
        fourth = sign(w, PACKED, BF16_5, 0x00200020, 0x41004100)
    else:
        first = sign(w, PACKED, F16_15, -2147450880, 0x3C003C00)
        third = sign(w, PACKED, F16_9, 0x02000200, 0x44004400)
        fourth = sign(w, PACKED, F16_8, 0x01000100, 0x48004800)
    return first, w & 0x40004000, third, fourth


@triton.jit
def signs(w, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PACKED: tl.constexpr):
    """[BN, BK / 32] words -> [BN, BK] of a column's constant plus or minus 1."""
    w = tl.reshape(w, (BN, BK // 128, 4))
    p0, p1, p2, p3 = four(w, DT, PACKED)
    p4, p5, p6, p7 = four(w << 2, DT, PACKED)
    p8, p9, p10, p11 = four(w << 4, DT, PACKED)
    c0, c1, c2, c3 = four(w << 6, DT, PACKED)
    d0, _, d2, d3 = four(w << 8, DT, PACKED)
    # Each join is a new last axis: of pair 8 q + 4 r + 2 t + half, first half, then t, r, q.
    t0 = tl.join(tl.join(p0, p1), tl.join(p2, p3))
    t1 = tl.join(tl.join(p4, p5), tl.join(p6, p7))
    t2 = tl.join(tl.join(p8, p9), tl.join(p10, p11))
    if DT == tl.bfloat16:
        t3 = tl.join(tl.join(c0, c1), tl.join(c2, d0))
    else:
        t3 = tl.join(tl.join(c2, c3), tl.join(d2, d3))
    p = tl.join(tl.join(t0, t1), tl.join(t2, t3))
    v = halves(p, DT)  # n, c, L, half, t, r, q, e
    return tl.reshape(tl.permute(v, (0, 1, 6, 5, 4, 3, 2, 7)), (BN, BK))


@triton.jit
def signs_by_pair(w, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr):
    """The same, each pair's shift, bit and base number out of its place in a row of 16. Without
    Hopper's matrix instruction the compiler sees through this alone: the form above goes through
    shared memory there."""
    w = tl.reshape(w, (BN, BK // 128, 4, 1))
    j = tl.arange(0, 16)[None, None, None, :]
    if DT == tl.bfloat16:
        shift = tl.where(j == 15, 8, j // 4 * 2)
        kind = tl.where(j == 15, 0, j % 4)
        mask = tl.where(kind == 2, 0x00400040, 0x00200020)
        base = tl.where(kind == 2, 0x40804080, 0x41004100)
        one = 0x3F803F80
    else:
        shift = tl.where(j < 12, j // 4 * 2, tl.where(j < 14, 6, 8))
        kind = tl.where(j < 12, j % 4, 2 + j % 2)
        mask = tl.where(kind == 2, 0x02000200, 0x01000100)
        base = tl.where(kind == 2, 0x44004400, 0x48004800)
        one = 0x3C003C00
    mask = tl.where(kind == 0, -2147450880, tl.where(kind == 1, 0x40004000, mask))
    base = tl.where(kind == 0, one, tl.where(kind == 1, 0, base))
    p = ((w << shift) & mask) | base
    v = tl.reshape(halves(p, DT), (BN, BK // 128, 4, 8, 2, 2))  # n, c, L, s, half, e
    return tl.reshape(tl.permute(v, (0, 1, 3, 4, 2, 5)), (BN, BK))


@triton.jit
def bit_tile(
    x, biases, arena_int, arena_float, planes, entries, strengths,
    m0, count, first, last, n0, column, out_features, k_from, k_to, plane, M, MP,
    N: tl.constexpr, K: tl.constexpr, DT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    """One work item: BN rows from n0 of a module, `count` tokens from m0 that have the same
    adapters, the entries first..last, over the columns k_from..k_to; written to one plane of ready
    deltas. An entry is (words, scales, number of sign planes, -), offsets in 16 bytes; one that is
    not there has no planes. biases:
    float32 [in / 128, MP], each token's sums of x times the columns' constants."""
    X: tl.constexpr = x.dtype.element_ty
    KP: tl.constexpr = (K + 127) // 128
    rows = (out_features + 127) // 128 * 128
    i = tl.arange(0, BM)
    m = m0 + i
    n = n0 + tl.arange(0, BN)
    at = tl.arange(0, BK)
    w_at = tl.arange(0, BK // 32)
    total = tl.zeros((BN, BM), tl.float32)
    bias = tl.zeros((BM,), tl.float32)
    many = tl.arange(0, 32)
    for c in range(k_from // 128, (k_to + 127) // 128, 32):
        mask = (c + many < (k_to + 127) // 128)[:, None] & (i < count)[None, :]
        place = biases + (c + many)[:, None] * MP + m[None, :]
        bias += tl.sum(tl.load(place, mask=mask, other=0.0), axis=0)
    for e in tl.range(first, last, disable_licm=True):
        words = arena_int + tl.load(entries + e * 4).to(tl.int64) * 4
        scales = arena_float + tl.load(entries + e * 4 + 1).to(tl.int64) * 4
        depth = tl.load(entries + e * 4 + 2)
        strength = tl.load(strengths + e)
        for p in tl.range(0, depth, disable_licm=True):
            acc = tl.zeros((BN, BM), tl.float32)
            for k in range(k_from, k_to, BK):
                chunk = (p * KP + k // 128 + w_at // 4)[None, :].to(tl.int64)
                w = tl.load(
                    words + chunk * (rows * 4) + n[:, None] * 4 + (w_at % 4)[None, :],
                    eviction_policy="evict_first",
                )
                seen = i[:, None] < count
                if not EVEN_K:
                    seen = seen & ((k + at)[None, :] < K)
                xt = tl.load(x + m[:, None] * K + (k + at)[None, :], mask=seen, other=0.0)
                if HOPPER:
                    b = signs(w, BN, BK, DT, PACKED).to(X)
                else:
                    b = signs_by_pair(w, BN, BK, DT).to(X)
                acc = tl.dot(b, tl.trans(xt), acc, input_precision="ieee")
            factor = strength * tl.load(scales + p * rows + n)
            total += (acc - bias[None, :]) * factor[:, None]
    own = (i < count)[None, :] & (n < out_features)[:, None]
    place = planes + (plane * MP + m)[None, :].to(tl.int64) * N + (column + n)[:, None]
    tl.store(place, total, mask=own)
