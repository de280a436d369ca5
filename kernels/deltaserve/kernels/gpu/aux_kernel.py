# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The first launch of a group: whatever its adapters need before the base product's epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.bit.kernel import bit_tile
from deltaserve.kernels.lowrank.kernel import gather_tile, shrink_tile
from deltaserve.kernels.sparse.kernel import panel_tile, sell_tile

# What an item is; its other numbers are named where the kernel reads them.
SHRINK = tl.constexpr(0)
GATHER = tl.constexpr(1)
BIT = tl.constexpr(2)
SELL = tl.constexpr(3)
PANEL = tl.constexpr(4)
ITEM = tl.constexpr(12)


@triton.jit(do_not_specialize=["M", "TILES", "WIDTH8"])
def aux_kernel(
    items, n_items, x, turned, biases, arena, arena_int, arena_float, arena_column, h, planes,
    page_a, page_col, page_lo, page_hi, page_scale, entries, strengths,
    M, TILES, WIDTH8,
    N: tl.constexpr, K: tl.constexpr, DT: tl.constexpr, BM: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, BK_SHRINK: tl.constexpr, H_SPLIT: tl.constexpr, BN: tl.constexpr,
    BN_BIT: tl.constexpr, BK_BIT: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    DEPTH: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr, HOPPER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A persistent grid of any size over n_items[0] items of 12 int32 each: LoRA shrink tiles,
    1-bit tiles, sparse slices, panels. Every item writes its own place in h or in the planes, so
    nothing is zeroed, nothing is atomic and the order is free."""
    MP = TILES * TOKENS
    WIDTH = WIDTH8 * 8
    if PDL:
        tl.extra.cuda.gdc_wait()  # x is the kernel before's
        tl.extra.cuda.gdc_launch_dependents()  # the base product may start beside this
    # disable_licm, here and in the items' own loops: what is hoisted out of loops of loops stays in
    # registers, too many for a second program.
    for i in tl.range(
        tl.program_id(0), tl.load(n_items), tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        item = items + i * ITEM
        kind = tl.load(item)
        a, b, c, d = (tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4))
        e, f, g, j = (tl.load(item + 5), tl.load(item + 6), tl.load(item + 7), tl.load(item + 8))
        u, v, w = tl.load(item + 9), tl.load(item + 10), tl.load(item + 11)
        if kind == SHRINK:  # pages a..b, tokens BM c.., columns 128 d..e, split f
            shrink_tile(
                x, arena, h, page_a, page_col, page_lo, page_hi, page_scale,
                a, b, c * BM, d * 128, tl.minimum(e * 128, K), f,
                M, MP, WIDTH, K, BM, BK_SHRINK, ROWS, EVEN_K,
            )  # fmt: skip
        elif kind == BIT:  # b tokens from a, entries c..d, w tiles from e, columns 128 u..v
            for t in tl.range(e, e + w, disable_licm=True):
                bit_tile(
                    x, biases, arena_int, arena_float, planes, entries, strengths,
                    a, b, c, d, t * BN_BIT, f, g, u * 128, tl.minimum(v * 128, K), j,
                    M, MP, N, K, DT, BM, BN_BIT, BK_BIT, EVEN_K, PACKED, HOPPER,
                )  # fmt: skip
        elif kind == SELL:  # tokens b..c of those from BT a, entries d..e, slices u..v
            sell_tile(
                x, turned, arena, arena_int, arena_column, planes, entries, strengths,
                a * BT, b, c, d, e, u, v, f, g, j, MP, N, K, BT, C, DEPTH,
            )  # fmt: skip
        elif kind == PANEL:  # b tokens from a, entries c..d, w tiles from e, share u of v
            for t in tl.range(e, e + w, disable_licm=True):
                panel_tile(
                    x, arena, arena_int, planes, entries, strengths,
                    a, b, c, d, t, u, v, f, g, j, M, MP, N, K, BM, BN, BK_SHRINK, EVEN_K,
                )  # fmt: skip
        else:  # GATHER: pages a..b, tokens BM c..
            gather_tile(
                x, arena_int, h, page_a, page_col, page_lo, page_hi, page_scale,
                a, b, c * BM, M, MP, WIDTH, K, BM, ROWS, H_SPLIT,
            )  # fmt: skip
