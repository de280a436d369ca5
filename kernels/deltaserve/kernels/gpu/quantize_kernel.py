# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Tokens in 8 bits, for the base's products of whole numbers, where the kernel that makes them does
not quantize them itself."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.base.integer_kernel import in_8_bits


@triton.jit
def store_in_8_bits(
    value, q, token_scale, sums, row, part, M, MP,
    K: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """value: float32 [BLOCK], the inputs of one part for the token `row`, zeros beyond K. q: int8
    [parts, M, K rounded up to 128]; token_scale: float32 [parts, MP]. STEP: unless it is 0, sums
    float32 [parts, K / STEP, MP] of q over STEP columns each."""
    PADDED: tl.constexpr = (K + 127) // 128 * 128
    STEPS: tl.constexpr = (K + STEP - 1) // STEP if STEP > 0 else 0
    k = tl.arange(0, BLOCK)
    whole, scale = in_8_bits(value)
    place = q + (part * M + row).to(tl.int64) * PADDED + k
    tl.store(place, whole, mask=k < tl.where(row < M, PADDED, 0))
    tl.store(token_scale + part * MP + row, scale)
    if STEP > 0:
        at = tl.arange(0, BLOCK // STEP)
        total = tl.sum(tl.reshape(whole.to(tl.int32), (BLOCK // STEP, STEP)), axis=1)
        tl.store(sums + (part * STEPS + at) * MP + row, total.to(tl.float32), mask=at < STEPS)


@triton.jit(do_not_specialize=["M", "TILES"])
def quantize_kernel(
    x, q, token_scale, sums, M, TILES,
    K: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """grid (tokens, parts). x: [parts, M, K]. TILES, TOKENS: MP = TILES * TOKENS. BLOCK: K rounded
    up to a power of two, at least 128. The rest: see `store_in_8_bits`."""
    row, part = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + (part * M + row).to(tl.int64) * K + k, mask=k < K, other=0.0)
    store_in_8_bits(
        value.to(tl.float32), q, token_scale, sums, row, part, M, TILES * TOKENS, K, BLOCK, STEP
    )
