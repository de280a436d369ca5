# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""LowRank in Triton: ``h = scale A x`` (shrink) and ``y += B h`` (expand), in pages of 8 rank rows.

A page of A is [8, in] and one of B [8, out], rank-major, both padded to 8 columns; ranks differ
freely, and pages of many adapters and of modules that share x stand in one list, each with the
tokens it is for. h is [split][rank row][token], the tokens contiguous; an entry that no page wrote
may hold anything. Offsets are in units of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(8)


@triton.jit
def page_rows(first, last, ROWS: tl.constexpr):
    """(page, row in it, whether it is one) of ROWS rank rows from page `first`."""
    j = tl.arange(0, ROWS)
    page = first + j // PAGE
    return page, j % PAGE, page < last


@triton.jit
def shrink_tile(
    x, arena, h, page_a, page_col, page_lo, page_hi, page_scale,
    first, last, m0, k_from, k_to, split, M, MP, WIDTH,
    K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One work item: the pages first..last, at most ROWS / 8, times BM tokens from m0, over the
    columns k_from..k_to. Only the block diagonal is kept: a page's own tokens."""
    KA: tl.constexpr = (K + 7) // 8 * 8
    UNIT: tl.constexpr = 128 // arena.dtype.element_ty.primitive_bitwidth
    page, row, live = page_rows(first, last, ROWS)
    offset = tl.load(page_a + page, mask=live, other=0).to(tl.int64) * UNIT
    m = m0 + tl.arange(0, BM)
    at = tl.arange(0, BK)
    acc = tl.zeros((ROWS, BM), tl.float32)
    for k in range(k_from, k_to, BK):
        seen = m[:, None] < M
        inside = live[:, None]
        if not EVEN_K:
            seen = seen & ((k + at)[None, :] < K)
            inside = inside & ((k + at)[None, :] < K)
        a = tl.load(
            arena + (offset + row * KA)[:, None] + (k + at)[None, :], mask=inside, other=0.0
        )
        xt = tl.load(x + m[:, None] * K + (k + at)[None, :], mask=seen, other=0.0)
        acc = tl.dot(a, tl.trans(xt), acc, input_precision="ieee")
    lo = tl.load(page_lo + page, mask=live, other=0)
    hi = tl.load(page_hi + page, mask=live, other=0)
    factor = tl.load(page_scale + page, mask=live, other=0.0)
    col = tl.load(page_col + page, mask=live, other=0) + row
    own = (m[None, :] >= lo[:, None]) & (m[None, :] < hi[:, None])
    place = h + (split * WIDTH + col)[:, None] * MP + m[None, :]
    tl.store(place, acc * factor[:, None], mask=own)


@triton.jit
def gather_tile(
    x, arena_int, h, page_a, page_col, page_lo, page_hi, page_scale,
    first, last, m0, M, MP, WIDTH,
    K: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The same for pages whose rows of A pick one column each: 8 column numbers, -1 for none. They
    are whole in the first split, zero in the others."""
    page, row, live = page_rows(first, last, ROWS)
    offset = tl.load(page_a + page, mask=live, other=0).to(tl.int64) * 4
    column = tl.load(arena_int + offset + row, mask=live, other=-1)
    m = m0 + tl.arange(0, BM)
    lo = tl.load(page_lo + page, mask=live, other=0)
    hi = tl.load(page_hi + page, mask=live, other=0)
    factor = tl.load(page_scale + page, mask=live, other=0.0)
    col = tl.load(page_col + page, mask=live, other=0) + row
    own = (m[None, :] >= lo[:, None]) & (m[None, :] < hi[:, None])
    picked = own & (column >= 0)[:, None]
    value = tl.load(x + m[None, :] * K + column[:, None], mask=picked, other=0.0).to(tl.float32)
    place = h + col[:, None] * MP + m[None, :]
    tl.store(place, value * factor[:, None], mask=own)
    for s in tl.static_range(1, SPLIT):
        tl.store(place + s * WIDTH * MP, tl.zeros((ROWS, BM), tl.float32), mask=own)


@triton.jit
def expand(
    acc, arena, h, page_b, page_col, page_lo, page_hi, first, last, m, n, out_features, MP, WIDTH,
    BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_N: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] += B^T h over the pages first..last, in chunks of ROWS rank rows whatever the
    number of adapters; n: the tile's rows within the module of out_features rows. h is read
    unmasked, as wide as it goes, and then selected."""
    UNIT: tl.constexpr = 128 // arena.dtype.element_ty.primitive_bitwidth
    width = (out_features + 7) // 8 * 8
    for p in tl.range(first, last, ROWS // PAGE, num_stages=3):
        page, row, live = page_rows(p, last, ROWS)
        offset = tl.load(page_b + page, mask=live, other=0).to(tl.int64) * UNIT
        inside = live[:, None]
        if not EVEN_N:
            inside = inside & (n < out_features)[None, :]
        b = tl.load(arena + (offset + row * width)[:, None] + n[None, :], mask=inside, other=0.0)
        lo = tl.load(page_lo + page, mask=live, other=0)
        hi = tl.load(page_hi + page, mask=live, other=0)
        col = tl.load(page_col + page, mask=live, other=0) + row
        place = h + col[:, None] * MP + m[None, :]
        total = tl.load(place, cache_modifier=".cg")
        for s in tl.static_range(1, SPLIT):
            total += tl.load(place + s * WIDTH * MP, cache_modifier=".cg")
        own = (m[None, :] >= lo[:, None]) & (m[None, :] < hi[:, None])
        total = tl.where(own, total, 0.0).to(b.dtype)
        acc = tl.dot(tl.trans(b), total, acc, input_precision="ieee")
    return acc
