# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Products of whole numbers in Triton: tokens in 8 bits times weights of 8 or 4 (base/words.py), as
native/w8a8.c and native/w4a8.c compute them.

Formats: "w8a8" with a scale per row, "w4a8" with a scale and a zero per group of inputs. The left
operand is the weight, as in base/kernel.py; of 8 bits it goes from memory to the matrix instruction
as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.base.float_kernel import load_words, scale_and_zero, sums_of


@triton.jit
def in_8_bits(value):
    """float32 [BLOCK], a token's inputs -> (int8 [BLOCK], scale): ``value ~ q * scale`` with scale
    = max |value| / 127, as `quantize_token` of native/integer.h. The scale of a token that is not
    finite is NaN, and so is all that is made of it."""
    # Of numbers without a sign, bits are in the same order; a NaN's are the largest.
    top = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    top = top.to(tl.float32, bitcast=True)
    scale = tl.where(top <= 1e-30, 1.0, tl.div_rn(top, 127.0))  # below, 1 / scale may overflow
    finite = scale <= 3e38
    inverse = tl.where(finite, tl.div_rn(1.0, scale), 0.0)
    # 1.5 * 2^23 leaves the whole number, rounded to nearest even, in the low bits.
    whole = tl.fma(
        value, inverse + tl.zeros_like(value), tl.full(value.shape, 12582912.0, tl.float32)
    )
    return whole.to(tl.int32, bitcast=True).to(tl.int8), tl.where(finite, scale, float("nan"))


@triton.jit
def nibble_bytes(w, BN: tl.constexpr, BK: tl.constexpr):
    """int32 [BN, BK / 8] words of nibbles -> int8 [BN, BK] of 0..15."""
    w = tl.reshape(w, (BN, BK // 32, 4, 1))
    w = (w >> (4 * tl.arange(0, 2)[None, None, None, :])) & 0x0F0F0F0F
    low, high = w.to(tl.int16), (w >> 16).to(tl.int16)
    even = tl.join(low.to(tl.int8), high.to(tl.int8))
    odd = tl.join((low >> 8).to(tl.int8), (high >> 8).to(tl.int8))
    b = tl.join(even, odd)  # n, c, L, s, high, odd
    return tl.reshape(tl.permute(b, (0, 1, 3, 2, 4, 5)), (BN, BK))


@triton.jit
def integer_product(
    x, token_scale, sums, weight, scale, zero, n, live, m, k_from, k_to, M, MP,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    DT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUM: tl.constexpr, STAGES: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """As `product`. x: int8 [M, K rounded up to 128], zeros beyond K, of the tokens' scales
    float32 [MP]. sums: of w4a8, float32 [K / SUM, MP], of x's numbers. w8a8 adds up whole numbers
    alone, w4a8 those of a step in a group, and the groups' sums in float32."""
    at = tl.arange(0, BK)
    seen = (m < M)[:, None]
    p_x = x + m[:, None] * ((K + 127) // 128 * 128) + at[None, :]
    if FORMAT == "w8a8":
        place = (at // 16)[None, :] * (N * 16) + n[:, None] * 16 + (at % 16)[None, :]
        total = tl.zeros((BN, BM), tl.int32)
        for k in tl.range(k_from, k_to, BK, num_stages=STAGES):
            xt = tl.trans(tl.load(p_x + k, mask=seen, other=0))
            p_w = weight + tl.cast(k, tl.int64) * N + place
            if EVEN_N:
                w = tl.load(p_w, eviction_policy="evict_first")
            else:
                w = tl.load(p_w, mask=live[:, None], other=0, eviction_policy="evict_first")
            total = tl.dot(w, xt, total, out_dtype=tl.int32)
        acc = total.to(tl.float32) * tl.load(scale + n, mask=live, other=0.0)[:, None]
    else:
        # Whole numbers that are added to the bits of 1.5 * 2^23 are added to the float.
        zeros = tl.full((BN, BM), 0x4B400000, tl.int32)
        acc = tl.zeros((BN, BM), tl.float32)
        SPAN: tl.constexpr = GROUP if GROUP < BK else BK
        for k in tl.range(k_from, k_to, BK, num_stages=STAGES):
            xt = tl.trans(tl.load(p_x + k, mask=seen, other=0))
            q = nibble_bytes(load_words(weight, k, n, live, N, 32, BK, EVEN_N), BN, BK)
            for i in tl.static_range(BK // SPAN):
                s, z = scale_and_zero(scale, zero, (k // GROUP + i) * N + n, live, DT)
                own = q
                if GROUP < BK:
                    own = tl.where((at // GROUP == i)[None, :], q, 0).to(tl.int8)
                part = tl.dot(own, xt, zeros, out_dtype=tl.int32)
                part = part.to(tl.float32, bitcast=True) - 12582912.0
                inputs = sums_of(sums, k + i * SPAN, m, MP, K, i, SPAN, SUM, EVEN_K)
                acc += (part - z[:, None] * inputs[None, :]) * s[:, None]
    return acc * tl.load(token_scale + m)[None, :]
