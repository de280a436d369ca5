# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sequences of several queries, cut into tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.attention.kernel import attend, finish, tile_heads, write_out


@triton.jit
def _row_of_tile(tile, query_start, rows, TOKENS: tl.constexpr):
    """The sequence that owns a tile, -1 if there are none.

    Sequence i's tiles begin at query_start[i] // TOKENS + i: known without a table, and far enough
    apart for the tiles it has. Counted rather than searched: independent loads, not a chain."""
    begun = 0
    for start in range(0, rows, 128):
        row = start + tl.arange(0, 128)
        first = tl.load(query_start + row, mask=row < rows, other=0)
        begun += tl.sum(((first // TOKENS + row <= tile) & (row < rows)).to(tl.int32), 0)
    return begun - 1


@triton.jit(
    do_not_specialize=[
        "sinks", "query_start", "lengths", "tables", "rows", "window", "row_step", "table_step",
        "query_step", "padded", "key_block", "value_block",
    ]
)  # fmt: skip
def prefill_kernel(
    out, sums, padded, query, keys, values, key_block, value_block, sinks,
    query_start, lengths, tables, rows, inner, outer, window, row_step, table_step, query_step,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
    HEAD_TILE: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SUM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens // (BM // HEAD_TILE) + captured rows, KV heads x head tiles). Tiles past those
    in use leave at once, and so do those of sequences of one query."""
    TOKENS: tl.constexpr = BM // HEAD_TILE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the ends of prompts, which take longest
    row = _row_of_tile(tile, query_start, tl.load(rows), TOKENS)
    if row < 0:
        return
    start = tl.load(query_start + row)
    queries = tl.load(query_start + row + 1) - start
    token = (tile - start // TOKENS - row) * TOKENS
    if (token >= queries) | (queries == 1):
        return
    past = tl.load(lengths + row) - queries
    kv_head, head, live = tile_heads(BM, HEAD_TILE, HEADS // KV_HEADS)
    tokens = token + tl.arange(0, BM) // HEAD_TILE
    live = live & (tl.arange(0, BM) < TOKENS * HEAD_TILE) & (tokens < queries)
    dk = tl.arange(0, BK)
    at = (start + tokens).to(tl.int64) * query_step * UNIT + head * KEY_DIM
    q_mask = live[:, None] & (dk < KEY_DIM)[None, :]
    q = tl.load(query + at[:, None] + dk[None, :], mask=q_mask, other=0.0)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    keys += kv_head * KEY_DIM
    values += kv_head * VALUE_DIM
    tables += row.to(tl.int64) * row_step
    position = tl.where(live, past + tokens, -1)
    if WINDOW:
        begin = tl.maximum(past + token + 1 - window, 0)
    else:  # the cells that every query of the tile sees need no masks
        begin = (past + token + 1) // BN * BN
        peak, total, acc = attend(
            peak, total, acc, q, keys, values, key_block, value_block, tables, table_step, 0, begin,
            position, inner, outer, window, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_SIZE, KEY_STEP,
            VALUE_STEP, BN, BK, BV, False, False, SOFTCAP,
        )  # fmt: skip
    end = past + tl.minimum(token + TOKENS, queries)
    peak, total, acc = attend(
        peak, total, acc, q, keys, values, key_block, value_block, tables, table_step, begin, end,
        position, inner, outer, window, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_SIZE, KEY_STEP,
        VALUE_STEP, BN, BK, BV, True, WINDOW, SOFTCAP,
    )  # fmt: skip
    acc = finish(peak, total, acc, sinks, head, live)
    write_out(out, sums, padded, acc, start + tokens, head, live, HEADS, VALUE_DIM, BV, SUM)
