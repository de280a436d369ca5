# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sequences of one query: each shared out among programs, whose parts are summed afterwards."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.attention.kernel import LOG2E, attend, finish, tile_heads, write_out


@triton.jit
def _split_cells(
    length, window, split, splits, split_tiles, BN: tl.constexpr, WINDOW: tl.constexpr
):
    """Cells [begin, end) of one split, and how many splits have any.

    Cells are dealt in tiles of BN, at least split_tiles of them to a split."""
    first = tl.maximum(length - window, 0) if WINDOW else 0
    tiles = tl.cdiv(length - first, BN)
    per_split = tl.maximum(tl.cdiv(tiles, splits), split_tiles)
    begin = first + split * per_split * BN
    return begin, tl.minimum(begin + per_split * BN, length), tl.cdiv(tiles, per_split)


@triton.jit(
    do_not_specialize=[
        "sinks", "query_start", "lengths", "tables", "rows", "window", "row_step", "table_step",
        "query_step", "split_tiles", "padded", "key_block", "value_block",
    ]
)  # fmt: skip
def decode_kernel(
    out, sums, padded, planes, stats, query, keys, values, key_block, value_block, sinks,
    query_start, lengths, tables, rows, inner, outer, window, row_step, table_step, query_step,
    split_tiles,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
    HEAD_TILE: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SUM: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid: (captured rows, KV heads x head tiles, splits).

    With SPLIT a program leaves its part of the sums in `planes` [splits, captured rows, heads,
    value_dim] and `stats` [splits, captured rows, heads, 2] for `reduce_kernel`, or nothing if it
    has no cells; without, it writes `out`."""
    row = tl.program_id(0)
    if row >= tl.load(rows):
        return
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        return
    length = tl.load(lengths + row)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    begin, end, _ = _split_cells(length, window, split, splits, split_tiles, BN, WINDOW)
    if begin >= end:
        return
    kv_head, head, live = tile_heads(BM, HEAD_TILE, HEADS // KV_HEADS)
    live = live & (tl.arange(0, BM) < HEAD_TILE)
    dk = tl.arange(0, BK)
    dv = tl.arange(0, BV)
    q = tl.load(
        query + token.to(tl.int64) * query_step * UNIT + (head * KEY_DIM)[:, None] + dk[None, :],
        mask=live[:, None] & (dk < KEY_DIM)[None, :],
        other=0.0,
    )
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    keys += kv_head * KEY_DIM
    values += kv_head * VALUE_DIM
    tables += row.to(tl.int64) * row_step
    position = tl.where(live, length - 1, -1)
    peak, total, acc = attend(
        peak, total, acc, q, keys, values, key_block, value_block, tables, table_step, begin,
        end, position, inner, outer, window, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_SIZE, KEY_STEP,
        VALUE_STEP, BN, BK, BV, True, WINDOW, SOFTCAP,
    )  # fmt: skip
    if SPLIT:
        wanted = live[:, None] & (dv < VALUE_DIM)[None, :]
        plane = (split.to(tl.int64) * tl.num_programs(0) + row) * HEADS + head
        tl.store(planes + (plane * VALUE_DIM)[:, None] + dv[None, :], acc, mask=wanted)
        tl.store(stats + plane * 2, peak, mask=live)
        tl.store(stats + plane * 2 + 1, total, mask=live)
    else:
        acc = finish(peak, total, acc, sinks, head, live)
        tokens = token + tl.zeros((BM,), tl.int32)
        write_out(out, sums, padded, acc, tokens, head, live, HEADS, VALUE_DIM, BV, SUM)


@triton.jit(
    do_not_specialize=[
        "sinks", "query_start", "lengths", "rows", "window", "splits", "split_tiles", "padded",
    ]
)  # fmt: skip
def reduce_kernel(
    out, sums, padded, planes, stats, sinks, query_start, lengths, rows, window, splits,
    split_tiles,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, MAX_SPLITS: tl.constexpr, SUM: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Sums the planes of `decode_kernel`, always in the same order. Grid: (captured rows, heads).

    Splits that had no cells wrote nothing, and are not read."""
    row = tl.program_id(0)
    if row >= tl.load(rows):
        return
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        return
    length = tl.load(lengths + row)
    _, _, used = _split_cells(length, window, 0, splits, split_tiles, BN, WINDOW)
    head = tl.program_id(1)
    step = tl.num_programs(0).to(tl.int64) * HEADS
    plane = row.to(tl.int64) * HEADS + head
    every = tl.arange(0, MAX_SPLITS)
    stat = stats + (plane + every * step) * 2
    peaks = tl.load(stat, mask=every < used, other=float("-inf"))
    totals = tl.load(stat + 1, mask=every < used, other=0.0)
    peak = tl.max(peaks, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    total = tl.sum(totals * tl.exp2(peaks - peak), 0)
    if sinks is not None:
        total += tl.exp2(sink - peak)
    dv = tl.arange(0, BV)
    acc = tl.zeros((BV,), tl.float32)
    for start in range(0, used, BS):
        some = start + tl.arange(0, BS)
        at = plane + some * step
        fade = tl.exp2(tl.load(stats + at * 2, mask=some < used, other=float("-inf")) - peak)
        part = tl.load(
            planes + (at * VALUE_DIM)[:, None] + dv[None, :],
            mask=(some < used)[:, None] & (dv < VALUE_DIM)[None, :],
            other=0.0,
        )
        acc += tl.sum(part * fade[:, None], 0)
    one = tl.zeros((1,), tl.int32)
    acc = (acc / total)[None, :]
    write_out(out, sums, padded, acc, token + one, head + one, one == 0, HEADS, VALUE_DIM, BV, SUM)
