# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Bit in Triton: ``y = sum of scale (signs x)`` of a tile of rows, straight from the words of
bit/words.py; nothing is unpacked to memory."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.base.kernel import bits_over, halves, over

SIGNS_BF16 = bits_over(0x80008000, 0x3F803F80)
SIGNS_F16 = bits_over(0x80008000, 0x3C003C00)


@triton.jit
def signs(w, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PACKED: tl.constexpr):
    """[BN, BK / 32] words -> [BN, BK] of +1 and -1: the sign bits over a one."""
    w = tl.reshape(w, (BN, BK // 128, 4, 1))
    w = w << tl.arange(0, 16)[None, None, None, :]
    if PACKED:
        if DT == tl.bfloat16:
            p = over(w, SIGNS_BF16)
        else:
            p = over(w, SIGNS_F16)
    else:
        p = (w & -2147450880) | (0x3F803F80 if DT == tl.bfloat16 else 0x3C003C00)
    b = tl.reshape(halves(p, DT), (BN, BK // 128, 4, 8, 2, 2))  # n, c, L, s, half, e
    return tl.reshape(tl.permute(b, (0, 1, 3, 4, 2, 5)), (BN, BK))


@triton.jit
def bit_tile(
    x, arena_int, arena_float, planes, entries, strengths,
    m0, count, first, last, n0, column, out_features, k_from, k_to, plane, M, MP,
    N: tl.constexpr, K: tl.constexpr, DT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One work item: BN rows from n0 of a module, `count` tokens from m0 that have the same
    adapters, the entries first..last, over the columns k_from..k_to; written to one plane of ready
    deltas. An entry is (words, scales, number of sign planes, -), offsets in 16 bytes."""
    X: tl.constexpr = x.dtype.element_ty
    KP: tl.constexpr = (K + 127) // 128
    rows = (out_features + 63) // 64 * 64
    i = tl.arange(0, BM)
    m = m0 + i
    n = n0 + tl.arange(0, BN)
    at = tl.arange(0, BK)
    w_at = tl.arange(0, BK // 32)
    total = tl.zeros((BN, BM), tl.float32)
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
                b = signs(w, BN, BK, DT, PACKED).to(X)
                acc = tl.dot(b, tl.trans(xt), acc, input_precision="ieee")
            total += acc * (strength * tl.load(scales + p * rows + n))[:, None]
    own = (i < count)[None, :] & (n < out_features)[:, None]
    place = planes + (plane * MP + m)[None, :].to(tl.int64) * N + (column + n)[:, None]
    tl.store(place, total, mask=own)
