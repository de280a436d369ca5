# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Paged attention in Triton: what the kernels for decoding sequences and for prompts share.

A tile's rows are (query token, query head) pairs that share one KV head, tokens first, so K and V
are read once per KV head (twice by groups of more than 32 heads, and so on). Softmax is computed
online, in float32 and in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_heads(BM: tl.constexpr, HEAD_TILE: tl.constexpr, GROUP: tl.constexpr):
    """The KV head of this program, and per row of its tile: the query head and whether it exists.

    Program axis 1 counts KV heads times tiles of HEAD_TILE heads, which is all of the group unless
    the group is larger than a tile."""
    HEAD_TILES: tl.constexpr = (GROUP + HEAD_TILE - 1) // HEAD_TILE
    kv_head = tl.program_id(1) // HEAD_TILES
    in_group = tl.program_id(1) % HEAD_TILES * HEAD_TILE + tl.arange(0, BM) % HEAD_TILE
    return kv_head, kv_head * GROUP + in_group, in_group < GROUP


@triton.jit
def attend(
    peak, total, acc, q, keys, values, key_block, value_block, table, table_step, begin, end,
    position, inner, outer, window,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Takes cells [begin, end) of a sequence into the running softmax of a tile of queries.

    peak, total [BM]: the largest logit so far, in base 2, and the sum of powers relative to it.
    acc [BM, BV]: the weighted sum of values, relative to it too. keys, values: of one KV head.
    key_block, value_block: from block to block, in KEY_STEP and VALUE_STEP elements. table: the
    sequence's blocks, table_step numbers from one to the next.
    position [BM]: where each query stands in its sequence; one that is negative sees nothing.
    Without MASKED every query sees every cell, and end - begin is a multiple of BN. inner and
    outer: see `logit_factors`.
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
            block = tl.load(table + at // BLOCK_SIZE * table_step, mask=owned, other=0)
        else:
            block = tl.load(table + at // BLOCK_SIZE * table_step)
        block, row = block.to(tl.int64), at % BLOCK_SIZE
        key = block * (key_block * KEY_STEP) + row * (KV_HEADS * KEY_DIM)
        value = block * (value_block * VALUE_STEP) + row * (KV_HEADS * VALUE_DIM)
        k = tl.load(keys + key[:, None] + dk[None, :], k_mask, 0.0)
        v = tl.load(values + value[:, None] + dv[None, :], v_mask, 0.0)
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
def write_out(
    out, sums, padded, acc, token, head, wanted,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BV: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Stores the outputs acc [rows, BV] of a (token, head) per row, where wanted. sums: unless it
    is None, float32 [HEADS VALUE_DIM / SUM, padded], what was stored summed over SUM columns each:
    what linears with 4-bit weights want of their input. SUM divides VALUE_DIM and BV."""
    dv = tl.arange(0, BV)
    mask = wanted[:, None] & (dv < VALUE_DIM)[None, :]
    y = acc.to(out.dtype.element_ty)
    place = token.to(tl.int64) * (HEADS * VALUE_DIM) + head * VALUE_DIM
    tl.store(out + place[:, None] + dv[None, :], y, mask=mask)
    if sums is not None:
        ROWS: tl.constexpr = acc.shape[0]
        at = tl.arange(0, BV // SUM)
        total = tl.sum(tl.reshape(y.to(tl.float32), (ROWS, BV // SUM, SUM)), axis=2)
        row = head[:, None] * (VALUE_DIM // SUM) + at[None, :]
        mask = wanted[:, None] & (at * SUM < VALUE_DIM)[None, :]
        tl.store(sums + row * padded + token[:, None], total, mask=mask)


@triton.jit
def finish(peak, total, acc, sinks, head, live):
    """The outputs [BM, BV] of a tile whose cells have all been seen."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        risen = tl.maximum(peak, sink)
        fade = tl.exp2(peak - risen)
        total = total * fade + tl.exp2(sink - risen)
        acc = acc * fade[:, None]
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]
