# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The base product in Triton: words of 4 or 8 bits unpacked straight into the registers that the
matrix instruction reads (base/words.py), with the weights as its left operand and the tokens as
its right one: a decode batch is the short side, and on Hopper the left operand may be registers.

Formats: "int4" with a scale and a zero per group, "int8" and "fp8" with a scale per row, "dense".
"""

from __future__ import annotations

import triton
import triton.language as tl


def bits_over(mask: int, word: int, flip: bool = False) -> tl.constexpr:
    """PTX for ``(w & mask) | word``, or ``^ word``, as one instruction. It has room for one
    constant, and the assembler would move the other to a register over and over; so the word is
    hidden from it: it is added to the program's number on the third axis, zero in every grid."""
    table = "0x6A" if flip else "0xEA"
    return tl.constexpr(
        "{ .reg .b32 c; mov.u32 c, %ctaid.z; "
        f"add.u32 c, c, {word:#x}; lop3.b32 $0, $1, {mask:#x}, c, {table}; }}"
    )


NIBBLES_BF16 = bits_over(0x000F000F, 0x43004300)
NIBBLES_F16 = bits_over(0x000F000F, 0x64006400)
LOW_BF16 = bits_over(0x007F007F, 0x43004300)
TOP_BF16 = bits_over(0x00800080, 0x43804380, flip=True)
BYTES_F16 = bits_over(0x00FF00FF, 0x64006400)


@triton.jit
def over(w, ASM: tl.constexpr):
    """What `bits_over` says, of every word."""
    return tl.inline_asm_elementwise(ASM, "=r,r", [w], tl.int32, True, 1)


@triton.jit
def nibble_pairs(w, DT: tl.constexpr, PACKED: tl.constexpr):
    """The lowest nibble of each half word added to 128 in bf16, to 1024 in f16."""
    if PACKED:
        if DT == tl.bfloat16:
            p = over(w, NIBBLES_BF16)
        else:
            p = over(w, NIBBLES_F16)
    else:
        p = (w & 0x000F000F) | (0x43004300 if DT == tl.bfloat16 else 0x64006400)
    return p


@triton.jit
def pair_fma(a, b, c, DT: tl.constexpr):
    """a * b + c on the two bf16 or f16 halves of 32-bit words, exact where the values are."""
    if DT == tl.bfloat16:
        r = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    else:
        r = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    return r


@triton.jit
def pair_sub(a, b, DT: tl.constexpr, PACKED: tl.constexpr):
    """a - b on pairs. PACKED: as one instruction; else as the interpreter can run it: the result
    is then two values side by side on a new last axis, otherwise a word."""
    if PACKED:
        if DT == tl.bfloat16:
            r = pair_fma(b, tl.full(b.shape, -1082081408, tl.int32), a, DT)  # two of -1
        else:
            r = pair_fma(b, tl.full(b.shape, -1140802560, tl.int32), a, DT)
        return halves(r, DT)
    else:
        return halves(a, DT) - halves(b, DT)


@triton.jit
def halves(p, DT: tl.constexpr):
    """Words -> their lower and upper half on a new last axis."""
    return tl.join(p.to(tl.int16), (p >> 16).to(tl.int16)).to(DT, bitcast=True)


@triton.jit
def nibbles(w, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PACKED: tl.constexpr):
    """[BN, BK / 8] words -> [BN, BK] of OFFSET + q, exact: 128 + q in bf16, 1024 + q in f16."""
    w = tl.reshape(w, (BN, BK // 32, 4, 1))
    w = w >> (4 * tl.arange(0, 4)[None, None, None, :])
    p = nibble_pairs(w, DT, PACKED)
    b = tl.reshape(halves(p, DT), (BN, BK // 32, 4, 2, 2, 2))  # n, c, L, s, half, e
    return tl.reshape(tl.permute(b, (0, 1, 3, 4, 2, 5)), (BN, BK))


@triton.jit
def nibbles_minus(w, z, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PACKED: tl.constexpr):
    """[BN, BK / 8] words, whole zeros z [BN], float32 -> [BN, BK] of q - z, exact."""
    w = tl.reshape(w, (BN, BK // 32, 4, 1))
    w = w >> (4 * tl.arange(0, 4)[None, None, None, :])
    p = nibble_pairs(w, DT, PACKED)
    zz = (z + (128 if DT == tl.bfloat16 else 1024)).to(DT)
    zz = zz.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    zz = tl.broadcast_to((zz | (zz << 16))[:, None, None, None], (BN, BK // 32, 4, 4))
    b = tl.reshape(pair_sub(p, zz, DT, PACKED), (BN, BK // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(b, (0, 1, 3, 4, 2, 5)), (BN, BK))


@triton.jit
def octets(w, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PACKED: tl.constexpr):
    """[BN, BK / 4] words of q + 128 -> [BN, BK] of q in -128..127, exact.

    bf16 has 7 bits of mantissa, one too few for 128 + byte: 128 + the lower seven bits, less 128
    or 256 by the highest one, which lies where the two constants differ."""
    w = tl.reshape(w, (BN, BK // 16, 4, 1))
    j = 8 * tl.arange(0, 2)[None, None, None, :]
    w = w >> j
    if DT == tl.bfloat16:
        if PACKED:
            p, c = over(w, LOW_BF16), over(w, TOP_BF16)
        else:
            p, c = (w & 0x007F007F) | 0x43004300, (w & 0x00800080) ^ 0x43804380
    else:
        if PACKED:
            p = over(w, BYTES_F16)
        else:
            p = (w & 0x00FF00FF) | 0x64006400
        c = tl.full(p.shape, 0x64806480, tl.int32)  # two of 1152
    b = pair_sub(p, c, DT, PACKED)  # n, c, L, half, e
    return tl.reshape(tl.permute(b, (0, 1, 3, 2, 4)), (BN, BK))


@triton.jit
def floats8(w, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PACKED: tl.constexpr):
    """[BN, BK / 4] words of float8 e4m3 -> [BN, BK], exact: the bits in the wider type's places
    are the value scaled by a power of two, which one packed multiplication undoes."""
    w = tl.reshape(w, (BN, BK // 16, 4, 1))
    j = 8 * (1 - tl.arange(0, 2))[None, None, None, :]
    w = w << j  # the byte in the upper half of each 16 bits
    if DT == tl.bfloat16:
        p = (w & -2147450880) | ((w & 0x7F007F00) >> 4)
    else:
        p = (w & -2147450880) | ((w & 0x7F007F00) >> 1)
    if PACKED:
        minus_zero = tl.full(p.shape, -2147450880, tl.int32)
        if DT == tl.bfloat16:
            power = tl.full(p.shape, 0x7B807B80, tl.int32)  # two of 2**120
        else:
            power = tl.full(p.shape, 0x5C005C00, tl.int32)  # two of 2**8
        b = halves(pair_fma(p, power, minus_zero, DT), DT)
    else:
        if DT == tl.bfloat16:
            b = (halves(p, DT).to(tl.float32) * 1.329227995784916e36).to(DT)  # 2**120
        else:
            b = (halves(p, DT).to(tl.float32) * 256.0).to(DT)
    return tl.reshape(tl.permute(b, (0, 1, 3, 2, 4)), (BN, BK))


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
def product(
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
    scale, zero: [K / GROUP, N] of int4, see `scale_and_zero`; else scale is float32 [N].
    HOW, of int4: "sums" leaves the zeros to the sums of x, so that nothing touches a weight after
    it is unpacked, which pays while tokens are few; "after" subtracts whole zeros from the
    weights. Both scale the sums of each group: no weight is ever rounded.
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
            p = weight + n[:, None] * K + (k + at)[None, :]
            if EVEN_N and EVEN_K:
                w = tl.load(p, eviction_policy="evict_first")
            else:
                w = tl.load(p, mask=inside, other=0.0, eviction_policy="evict_first")
            acc = tl.dot(w, xt, acc, input_precision="ieee")
        elif FORMAT == "int8":
            w = load_words(weight, k, n, live, N, 16, BK, EVEN_N)
            acc = tl.dot(octets(w, BN, BK, DT, PACKED).to(X), xt, acc, input_precision="ieee")
        elif FORMAT == "fp8":
            w = load_words(weight, k, n, live, N, 16, BK, EVEN_N)
            acc = tl.dot(floats8(w, BN, BK, DT, PACKED).to(X), xt, acc, input_precision="ieee")
        else:
            w = load_words(weight, k, n, live, N, 32, BK, EVEN_N)
            s, z = scale_and_zero(scale, zero, (k // GROUP) * N + n, live, DT)
            if HOW == "sums":
                part = tl.dot(nibbles(w, BN, BK, DT, PACKED).to(X), xt, input_precision="ieee")
                total = tl.load(sums + (k // SUM) * MP + m)
                for i in tl.static_range(1, BK // SUM):
                    more = sums + (k // SUM + i) * MP + m
                    if EVEN_K:
                        total += tl.load(more)
                    else:
                        total += tl.load(more, mask=(m >= 0) & (k + i * SUM < K), other=0.0)
                offset = z + (128 if DT == tl.bfloat16 else 1024)
                acc += (part - offset[:, None] * total[None, :]) * s[:, None]
            else:
                w = nibbles_minus(w, z, BN, BK, DT, PACKED)
                part = tl.dot(w.to(X), xt, input_precision="ieee")
                acc += part * s[:, None]
    if FORMAT == "int8" or FORMAT == "fp8":
        acc *= tl.load(scale + n, mask=live, other=0.0)[:, None]
    return acc
