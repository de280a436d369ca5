# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Words of 4 or 8 bits (base/words.py) as numbers, in the registers that the matrix instruction
reads."""

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
def codes(w, code, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / 8] words -> [BN, BK] of code[q], float32. code: float32 [16]."""
    w = tl.reshape(w, (BN, BK // 32, 4, 1))
    w = (w >> (4 * tl.arange(0, 4)[None, None, None, :])) & 0x000F000F
    c = tl.load(code + tl.join(w & 0xFFFF, w >> 16))
    b = tl.reshape(c, (BN, BK // 32, 4, 2, 2, 2))  # n, c, L, s, half, e
    return tl.reshape(tl.permute(b, (0, 1, 3, 4, 2, 5)), (BN, BK))
