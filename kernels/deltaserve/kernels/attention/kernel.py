# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Paged attention in Triton: the kernels; `attention/gpu.py` launches them and says what they do.

A tile's rows are (query token, query head) pairs that share one KV head, tokens first, so K and V
are read once per KV head. Softmax is computed online, in float32 and in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_heads(BM: tl.constexpr, HEAD_TILE: tl.constexpr, GROUP: tl.constexpr):
    """The KV head of this program, and per row of its tile: the query head and whether it exists.

    Program axis 1 counts KV heads times tiles of HEAD_TILE heads, which is all of the group unless
    the group is larger than a tile."""
    HEAD_TILES: tl.constexpr = (GROUP + HEAD_TILE - 1) // HEAD_TILE
    kv_head = tl.program_id(1) // HEAD_TILES
    in_group = tl.program_id(1) % HEAD_TILES * HEAD_TILE + tl.arange(0, BM) % HEAD_TILE
    return kv_head, kv_head * GROUP + in_group, in_group < GROUP


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


@triton.jit
def _attend(
    peak,
    total,
    acc,
    q,
    keys,
    values,
    table,
    begin,
    end,
    position,
    inner,
    outer,
    window,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Takes cells [begin, end) of a sequence into the running softmax of a tile of queries.

    peak, total [BM]: the largest logit so far (in base 2) and the sum of powers relative to it.
    acc [BM, BV]: the weighted sum of values, relative to it too. keys, values: of one KV head.
    position [BM]: where each query stands in its sequence; one that is negative sees nothing.
    Without MASKED every query sees every cell, and end - begin is a multiple of BN. inner scales
    a product to the argument of the cap (times 2 log2(e)), outer what it gives to base 2.
    """
    dk = tl.arange(0, BK)
    dv = tl.arange(0, BV)
    for start in range(begin, end, BN):
        at = start + tl.arange(0, BN)
        k_mask = (dk < KEY_DIM)[None, :]
        v_mask = (dv < VALUE_DIM)[None, :]
        if MASKED:
            owned = at < end
            k_mask = k_mask & owned[:, None]
            v_mask = v_mask & owned[:, None]
            block = tl.load(table + at // BLOCK_SIZE, mask=owned, other=0)
        else:
            block = tl.load(table + at // BLOCK_SIZE)
        cell = block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
        k = tl.load(keys + (cell * (KV_HEADS * KEY_DIM))[:, None] + dk[None, :], k_mask, 0.0)
        v = tl.load(values + (cell * (KV_HEADS * VALUE_DIM))[:, None] + dv[None, :], v_mask, 0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + exp(2 x)), which no argument overflows
            logits = 1.0 - 2.0 / (1.0 + tl.exp2(logits * inner))
        if MASKED:
            seen = at[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
        risen = tl.maximum(peak, tl.max(logits, 1) * outer)
        anchor = tl.where(risen == float("-inf"), 0.0, risen)  # rows that have seen nothing yet
        weights = tl.exp2(logits * outer - anchor[:, None])
        fade = tl.exp2(peak - anchor)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = risen
    return peak, total, acc


@triton.jit
def _finish(peak, total, acc, sinks, head, live):
    """The outputs [BM, BV] of a tile whose cells have all been seen."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        risen = tl.maximum(peak, sink)
        fade = tl.exp2(peak - risen)
        total = total * fade + tl.exp2(sink - risen)
        acc = acc * fade[:, None]
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(
    do_not_specialize=[
        "sinks",
        "query_start",
        "lengths",
        "tables",
        "rows",
        "window",
        "width",
        "query_step",
        "split_tiles",
    ]
)
def decode_kernel(
    out,
    planes,
    stats,
    query,
    keys,
    values,
    sinks,
    query_start,
    lengths,
    tables,
    rows,
    inner,
    outer,
    window,
    width,
    query_step,
    split_tiles,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Sequences of one query. Grid: (captured rows, KV heads x head tiles, splits).

    With SPLIT a program leaves its part of the sums in `planes` [splits, captured rows, heads,
    value_dim] and `stats` [..., 2], for `reduce_kernel`; without, it writes `out`."""
    row = tl.program_id(0)
    if row >= tl.load(rows):
        return
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        return
    length = tl.load(lengths + row)
    split = tl.program_id(2)
    begin, end, _ = _split_cells(length, window, split, tl.num_programs(2), split_tiles, BN, WINDOW)
    if begin >= end:
        return
    kv_head, head, live = _tile_heads(BM, HEAD_TILE, HEADS // KV_HEADS)
    live = live & (tl.arange(0, BM) < HEAD_TILE)
    dk = tl.arange(0, BK)
    dv = tl.arange(0, BV)
    q = tl.load(
        query + token.to(tl.int64) * query_step * UNIT + (head * KEY_DIM)[:, None] + dk[None, :],
        mask=live[:, None] & (dk < KEY_DIM)[None, :],
        other=0.0,
    )
    peak, total, acc = _attend(
        tl.full((BM,), float("-inf"), tl.float32),
        tl.zeros((BM,), tl.float32),
        tl.zeros((BM, BV), tl.float32),
        q,
        keys + kv_head * KEY_DIM,
        values + kv_head * VALUE_DIM,
        tables + row.to(tl.int64) * width,
        begin,
        end,
        tl.where(live, length - 1, -1),
        inner,
        outer,
        window,
        KV_HEADS,
        KEY_DIM,
        VALUE_DIM,
        BLOCK_SIZE,
        BN,
        BK,
        BV,
        True,
        WINDOW,
        SOFTCAP,
    )
    wanted = live[:, None] & (dv < VALUE_DIM)[None, :]
    if SPLIT:
        plane = (split.to(tl.int64) * tl.num_programs(0) + row) * HEADS + head
        tl.store(planes + (plane * VALUE_DIM)[:, None] + dv[None, :], acc, mask=wanted)
        tl.store(stats + plane * 2, peak, mask=live)
        tl.store(stats + plane * 2 + 1, total, mask=live)
    else:
        acc = _finish(peak, total, acc, sinks, head, live)
        at = token.to(tl.int64) * (HEADS * VALUE_DIM) + head * VALUE_DIM
        tl.store(out + at[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=wanted)


@triton.jit(
    do_not_specialize=[
        "sinks",
        "query_start",
        "lengths",
        "rows",
        "window",
        "splits",
        "split_tiles",
    ]
)
def reduce_kernel(
    out,
    planes,
    stats,
    sinks,
    query_start,
    lengths,
    rows,
    window,
    splits,
    split_tiles,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Sums the planes of `decode_kernel`, always in the same order. Grid: (captured rows, heads).

    Splits that had no cells wrote nothing, and are not read."""
    row = tl.program_id(0)
    if row >= tl.load(rows):
        return
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        return
    _, _, used = _split_cells(tl.load(lengths + row), window, 0, splits, split_tiles, BN, WINDOW)
    head = tl.program_id(1)
    step = tl.num_programs(0).to(tl.int64) * HEADS
    plane = row.to(tl.int64) * HEADS + head
    every = tl.arange(0, MAX_SPLITS)
    at = plane + every * step
    peaks = tl.load(stats + at * 2, mask=every < used, other=float("-inf"))
    totals = tl.load(stats + at * 2 + 1, mask=every < used, other=0.0)
    peak = tl.max(peaks, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
        total = tl.sum(totals * tl.exp2(peaks - peak), 0) + tl.exp2(sink - peak)
    else:
        total = tl.sum(totals * tl.exp2(peaks - peak), 0)
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
    out += token.to(tl.int64) * (HEADS * VALUE_DIM) + head * VALUE_DIM
    tl.store(out + dv, (acc / total).to(out.dtype.element_ty), mask=dv < VALUE_DIM)


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
        "sinks",
        "query_start",
        "lengths",
        "tables",
        "rows",
        "window",
        "width",
        "query_step",
    ]
)
def prefill_kernel(
    out,
    query,
    keys,
    values,
    sinks,
    query_start,
    lengths,
    tables,
    rows,
    inner,
    outer,
    window,
    width,
    query_step,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Sequences of several queries. Grid: (tokens // (BM // HEAD_TILE) + captured rows, KV heads
    x head tiles). Tiles past those in use leave at once."""
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
    kv_head, head, live = _tile_heads(BM, HEAD_TILE, HEADS // KV_HEADS)
    tokens = token + tl.arange(0, BM) // HEAD_TILE
    live = live & (tl.arange(0, BM) < TOKENS * HEAD_TILE) & (tokens < queries)
    dk = tl.arange(0, BK)
    dv = tl.arange(0, BV)
    at = (start + tokens).to(tl.int64) * query_step * UNIT + head * KEY_DIM
    q = tl.load(
        query + at[:, None] + dk[None, :],
        mask=live[:, None] & (dk < KEY_DIM)[None, :],
        other=0.0,
    )
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    keys += kv_head * KEY_DIM
    values += kv_head * VALUE_DIM
    tables += row.to(tl.int64) * width
    position = tl.where(live, past + tokens, -1)
    if WINDOW:
        begin = tl.maximum(past + token + 1 - window, 0)
    else:  # the cells that every query of the tile sees need no masks
        begin = (past + token + 1) // BN * BN
        peak, total, acc = _attend(
            peak, total, acc, q, keys, values, tables, 0, begin, position, inner, outer, window,
            KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_SIZE, BN, BK, BV, False, False, SOFTCAP,
        )  # fmt: skip
    end = past + tl.minimum(token + TOKENS, queries)
    peak, total, acc = _attend(
        peak, total, acc, q, keys, values, tables, begin, end, position, inner, outer, window,
        KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_SIZE, BN, BK, BV, True, WINDOW, SOFTCAP,
    )  # fmt: skip
    acc = _finish(peak, total, acc, sinks, head, live)
    to = (start + tokens).to(tl.int64) * (HEADS * VALUE_DIM) + head * VALUE_DIM
    wanted = live[:, None] & (dv < VALUE_DIM)[None, :]
    tl.store(out + to[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["cells", "tokens", "key_step", "value_step"])
def write_kernel(
    keys,
    values,
    key,
    value,
    cells,
    key_step,
    value_step,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies a token's key and value, of all KV heads, to its cell. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    cell = tl.load(cells + token).to(tl.int64)
    if cell < 0:
        return
    for start in tl.static_range(0, KEY_WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k = tl.load(key + token * key_step * KEY_UNIT + at, mask=at < KEY_WIDTH)
        tl.store(keys + cell * KEY_WIDTH + at, k.to(keys.dtype.element_ty), mask=at < KEY_WIDTH)
    for start in tl.static_range(0, VALUE_WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(value + token * value_step * VALUE_UNIT + at, mask=at < VALUE_WIDTH)
        tl.store(
            values + cell * VALUE_WIDTH + at, v.to(values.dtype.element_ty), mask=at < VALUE_WIDTH
        )
