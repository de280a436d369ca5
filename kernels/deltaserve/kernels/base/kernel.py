# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The base product in Triton, of floats or of whole numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.base.float_kernel import float_product
from deltaserve.kernels.base.integer_kernel import integer_product


@triton.jit
def product(
    x, token_scale, sums, weight, scale, zero, n, live, m, k_from, k_to, M, MP,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HOW: tl.constexpr, DT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUM: tl.constexpr, STAGES: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM] of W x^T over the columns k_from..k_to of the rows n, `live` where n is a
    row of the weight, and the tokens m. See `float_product` and `integer_product`."""
    if FORMAT == "w8a8" or FORMAT == "w4a8":
        acc = integer_product(
            x, token_scale, sums, weight, scale, zero, n, live, m, k_from, k_to, M, MP,
            N, K, FORMAT, GROUP, DT, BM, BN, BK, SUM, STAGES, EVEN_N, EVEN_K,
        )  # fmt: skip
    else:
        acc = float_product(
            x, sums, weight, scale, zero, n, live, m, k_from, k_to, M, MP,
            N, K, FORMAT, GROUP, HOW, DT, BM, BN, BK, SUM, STAGES, EVEN_N, EVEN_K, PACKED,
        )  # fmt: skip
    return acc
