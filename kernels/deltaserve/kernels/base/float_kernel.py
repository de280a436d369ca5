# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The base product of floats in Triton: words of 4 or 8 bits unpacked straight into the registers
that the matrix instruction reads (base/words.py), with the weights as its left operand and the
tokens as its right one: a decode batch is the short side, and on Hopper the left operand may be
registers.

Formats: "int4" with a scale and a zero per group, "code4" (numbers of a table of 16) with a scale
per group, "int8" and "fp8" with a scale per row or per group, "uint8" with a scale and a zero per
group, "dense".
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.base.unpack_kernel import codes, floats8, nibbles, nibbles_minus, octets


@triton.jit
def dot_exact(w, xt, X: tl.constexpr):
    """float32 w [BN, BK] times xt [BK, BM] of type X, summed in float32. For bf16, the 24 bits of a
    weight are three numbers of 8."""
    if X == tl.bfloat16:
        top = (w.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        rest = w - top
        middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        part = tl.dot((rest - middle).to(X), xt)
        part = tl.dot(middle.to(X), xt, part)
        part = tl.dot(top.to(X), xt, part)
    else:
        part = tl.dot(w, xt.to(tl.float32), input_precision="ieee")
    return part


@triton.jit
def columns(w, i, GROUP: tl.constexpr, BK: tl.constexpr):
    """w [BN, BK], zero but for the i-th group of its columns, unless they are of one group."""
    if GROUP < BK:
        w = tl.where((tl.arange(0, BK) // GROUP == i)[None, :], w, 0.0)
    return w


@triton.jit
def load_words(
    weight, k, n, live, N: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr, EVEN_N: tl.constexpr
):
    """[BN, 4 BK / SPAN] words of the columns k.., laid out [in / SPAN, N, 4]: a row's 16 bytes are
    contiguous in each span."""
    at = tl.arange(0, 4 * BK // SPAN)
    p = weight + (k // SPAN + at // 4)[None, :] * (N * 4) + n[:, None] * 4 + (at % 4)[None, :]
    if EVEN_N:
        w = tl.load(p, eviction_policy="evict_first")
    else:
        w = tl.load(p, mask=live[:, None], other=0, eviction_policy="evict_first")
    return w


@triton.jit
def scale_and_zero(scale, zero, at, live, DT: tl.constexpr):
    """float32 (scale, zero). scale: int32, the two side by side as numbers of type DT, the zero in
    the upper half: four bytes are what can be copied ahead; or float32, with zero beside it."""
    if scale.dtype.element_ty == tl.int32:
        both = tl.load(scale + at, mask=live, other=0)
        if DT == tl.bfloat16:
            s = (both << 16).to(tl.float32, bitcast=True)
            z = (both & -65536).to(tl.float32, bitcast=True)
        else:
            s = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            z = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        s = tl.load(scale + at, mask=live, other=0.0)
        z = tl.load(zero + at, mask=live, other=0.0)
    return s, z


@triton.jit
def sums_of(
    sums, k, m, MP, K: tl.constexpr, PIECE: tl.constexpr, SPAN: tl.constexpr, SUM: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """[BM], x summed over the SPAN columns k.., the PIECE-th group of a step that begins inside."""
    for j in tl.static_range(SPAN // SUM):
        p = sums + (k // SUM + j) * MP + m
        if EVEN_K or PIECE + j == 0:
            more = tl.load(p)
        else:
            more = tl.load(p, mask=(m >= 0) & (k + j * SUM < K), other=0.0)
        if j == 0:
            total = more
        else:
            total += more
    return total


@triton.jit
def float_product(
    x, sums, weight, scale, zero, n, live, m, k_from, k_to, M, MP,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HOW: tl.constexpr, DT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUM: tl.constexpr, STAGES: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM] of W x^T over the columns k_from..k_to of the rows n, `live` where n is a
    row of the weight, and the tokens m.

    x: [M, K]. sums: float32 [K / SUM, MP], x summed over SUM columns each, which divide a step;
    read by HOW "sums" alone.
    scale, zero: [K / GROUP, N] of int4 and uint8, see `scale_and_zero`; else scale is float32,
    [K / GROUP, N] or, where GROUP is 1, [N], and zero is the table of code4. A step has one group
    or, where they are smaller, several, of which there are as many as whole steps have.
    HOW, of int4: "sums" leaves the zeros to the sums of x, so that nothing touches a weight after
    it is unpacked, which pays while tokens are few; "after" subtracts zeros, whole ones unless X
    is float32, from the weights. Both scale the sums of each group: no weight is ever rounded.
    """
    X: tl.constexpr = x.dtype.element_ty
    at = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), tl.float32)
    # Said here and not only of the launch, the number of stages is that of every load in the loop:
    # scales that are waited for at each step would cost more than the weights.
    for k in tl.range(k_from, k_to, BK, num_stages=STAGES):
        seen = m[:, None] < M
        if not EVEN_K:
            seen = seen & ((k + at)[None, :] < K)
        xt = tl.trans(tl.load(x + m[:, None] * K + (k + at)[None, :], mask=seen, other=0.0))
        if FORMAT == "dense":
            inside = live[:, None] & ((k + at)[None, :] < K)
            row = n[:, None]
            if N * K >= 2147483648:
                row = row.to(tl.int64)
            p = weight + row * K + (k + at)[None, :]
            if EVEN_N and EVEN_K:
                w = tl.load(p, eviction_policy="evict_first")
            else:
                w = tl.load(p, mask=inside, other=0.0, eviction_policy="evict_first")
            acc = tl.dot(w, xt, acc, input_precision="ieee")
        elif FORMAT == "int8" and GROUP == 1:
            w = load_words(weight, k, n, live, N, 16, BK, EVEN_N)
            acc = tl.dot(octets(w, BN, BK, DT, PACKED).to(X), xt, acc, input_precision="ieee")
        elif FORMAT == "fp8" and GROUP == 1:
            w = load_words(weight, k, n, live, N, 16, BK, EVEN_N)
            acc = tl.dot(floats8(w, BN, BK, DT, PACKED).to(X), xt, acc, input_precision="ieee")
        else:
            BITS4: tl.constexpr = FORMAT == "int4" or FORMAT == "code4"
            w = load_words(weight, k, n, live, N, 32 if BITS4 else 16, BK, EVEN_N)
            SPAN: tl.constexpr = GROUP if GROUP < BK else BK
            for i in tl.static_range(BK // SPAN):
                own = (k // GROUP + i) * N + n
                if FORMAT == "int4" or FORMAT == "uint8":
                    s, z = scale_and_zero(scale, zero, own, live, DT)
                else:
                    s = tl.load(scale + own, mask=live, other=0.0)
                if FORMAT == "int4" and HOW == "sums":
                    q = columns(nibbles(w, BN, BK, DT, PACKED), i, GROUP, BK)
                    part = tl.dot(q.to(X), xt, input_precision="ieee")
                    total = sums_of(sums, k + i * SPAN, m, MP, K, i, SPAN, SUM, EVEN_K)
                    offset = z + (128 if DT == tl.bfloat16 else 1024)
                    part -= offset[:, None] * total[None, :]
                elif FORMAT == "int4":
                    if X == tl.float32:
                        q = nibbles(w, BN, BK, DT, PACKED).to(X) - 1024 - z[:, None]
                    else:
                        q = nibbles_minus(w, z, BN, BK, DT, PACKED)
                    q = columns(q, i, GROUP, BK)
                    part = tl.dot(q.to(X), xt, input_precision="ieee")
                elif FORMAT == "code4":
                    part = dot_exact(columns(codes(w, zero, BN, BK), i, GROUP, BK), xt, X)
                elif FORMAT == "fp8":
                    q = columns(floats8(w, BN, BK, DT, PACKED), i, GROUP, BK)
                    part = tl.dot(q.to(X), xt, input_precision="ieee")
                else:
                    q = octets(w, BN, BK, DT, PACKED)
                    if FORMAT == "uint8":
                        q = q.to(tl.float32) - z[:, None]  # at most 256: exact in X
                    part = tl.dot(columns(q, i, GROUP, BK).to(X), xt, input_precision="ieee")
                acc += part * s[:, None]
    if GROUP == 1 and FORMAT != "dense":
        acc *= tl.load(scale + n, mask=live, other=0.0)[:, None]
    return acc
