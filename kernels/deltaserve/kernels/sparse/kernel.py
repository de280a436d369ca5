# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sparse deltas in Triton: single entries as SELL slices, whole rows and blocks as panels."""

from __future__ import annotations

import triton
import triton.language as tl

ANY = tl.constexpr(1 << 30)
"""More rows than there are."""


@triton.jit
def sell_tile(
    x, turned, arena, arena_int, arena_column, planes, entries, strengths,
    m0, lo, hi, first, last, slice_from, slice_to, column, out_features, plane, MP,
    N: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One work item: slices of C rows for BT tokens from m0 of which lo..hi are its own, all with
    the entries first..last; written to one plane of ready deltas.

    SELL-C-sigma: rows sorted by length within a window, a slice stored column-major and padded to
    its longest row, so that a lane owns a row: coalesced values and columns, a private sum. An
    entry is (slice starts, rows, columns, values), offsets in 16 bytes. Entries sort their rows
    differently: an item that has several spans whole windows and adds one after the other.
    turned: x as [K, MP], where a column's tokens are one load; read if BT > 1, else x. An entry
    at -1 is not there: its rows are zeros, in their own order.
    """
    UNIT: tl.constexpr = 128 // arena.dtype.element_ty.primitive_bitwidth
    WIDE: tl.constexpr = 128 // arena_column.dtype.element_ty.primitive_bitwidth
    i = tl.arange(0, DEPTH)
    r = tl.arange(0, C)
    m = m0 + tl.arange(0, BT)
    own = (m >= lo) & (m < hi)
    for e in tl.range(first, last, disable_licm=True):
        at_starts = tl.load(entries + e * 4)
        there = at_starts >= 0
        starts = arena_int + at_starts.to(tl.int64) * 4
        rows = arena_int + tl.load(entries + e * 4 + 1).to(tl.int64) * 4
        columns = arena_column + tl.load(entries + e * 4 + 2).to(tl.int64) * WIDE
        values = arena + tl.load(entries + e * 4 + 3).to(tl.int64) * UNIT
        strength = tl.load(strengths + e)
        for s in tl.range(slice_from, slice_to, disable_licm=True):
            begin = tl.load(starts + s, mask=there, other=0)
            length = tl.load(starts + s + 1, mask=there, other=0) - begin
            begin *= C
            acc = tl.zeros((DEPTH, C, BT), tl.float32)
            for t in tl.range(0, length, DEPTH, num_stages=3):
                z = begin + (t + i)[:, None] * C + r[None, :]
                live = (t + i)[:, None] < length
                c = tl.load(columns + z, mask=live, other=0).to(tl.int32)
                if WIDE == 8:
                    c = c & 0xFFFF
                v = tl.load(values + z, mask=live, other=0.0).to(tl.float32)
                if BT == 1:
                    p = x + m[None, None, :] * K + c[:, :, None]
                else:
                    p = turned + c[:, :, None] * MP + m[None, None, :]
                g = tl.load(p, mask=live[:, :, None], other=0.0).to(tl.float32)
                acc += g * v[:, :, None]
            n = s * C + r
            own_order = tl.where(n < out_features, n, -1)
            n = tl.load(rows + n, mask=n < tl.where(there, ANY, 0), other=0)
            n = tl.where(there, n, own_order)
            place = planes + (plane * MP + m)[None, :].to(tl.int64) * N + (column + n)[:, None]
            mask = (n >= 0)[:, None] & own[None, :]
            total = tl.sum(acc, axis=0) * strength
            if e > first:
                total += tl.load(place, mask=mask, other=0.0)
            tl.store(place, total, mask=mask)
        tl.debug_barrier()  # the next entry's rows were stored by other threads


@triton.jit
def panel_tile(
    x, arena, arena_int, planes, entries, strengths,
    m0, count, first, last, tile, share, shares, column, out_features, plane, M, MP,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """One work item: BN rows of a module, number `tile`, for `count` tokens from m0 that have the
    entries first..last; one of `shares` parts of each entry's chunks; written to one plane.

    An entry is (chunk starts by tile, chunks, blob, -); one at -1 is not there. A chunk is 8
    numbers: first column / 8, columns / 8, values, row stride / 8, first row, one past the last,
    row numbers or -1, -; its offsets are relative to the blob. Its rows are those first..last of
    the module, or what the row numbers say each row of the tile is, -1 for none.
    """
    UNIT: tl.constexpr = 128 // arena.dtype.element_ty.primitive_bitwidth
    i = tl.arange(0, BM)
    m = m0 + i
    r = tl.arange(0, BN)
    n = tile * BN + r
    at = tl.arange(0, BK)
    total = tl.zeros((BN, BM), tl.float32)
    for e in tl.range(first, last, disable_licm=True):
        at_starts = tl.load(entries + e * 4)
        starts = arena_int + at_starts.to(tl.int64) * 4
        chunks = arena_int + tl.load(entries + e * 4 + 1).to(tl.int64) * 4
        blob = tl.load(entries + e * 4 + 2).to(tl.int64)
        begin = tl.load(starts + tile, mask=at_starts >= 0, other=0)
        number = tl.load(starts + tile + 1, mask=at_starts >= 0, other=0) - begin
        acc = tl.zeros((BN, BM), tl.float32)
        for c in tl.range(
            begin + number * share // shares,
            begin + number * (share + 1) // shares,
            disable_licm=True,
        ):
            chunk = chunks + c * 8
            k0 = tl.load(chunk) * 8
            width = tl.load(chunk + 1) * 8
            values = arena + (blob + tl.load(chunk + 2)) * UNIT
            stride = tl.load(chunk + 3) * 8
            lo, hi = tl.load(chunk + 4), tl.load(chunk + 5)
            numbers = tl.load(chunk + 6)
            held = (n >= lo) & (n < hi)
            row = n - lo
            if numbers >= 0:
                row = tl.load(arena_int + (blob + numbers) * 4 + r)
                held = row >= 0
            for k in range(0, width, BK):
                inside = ((k + at) < width)[None, :]
                w = tl.load(
                    values + row.to(tl.int64)[:, None] * stride + (k + at)[None, :],
                    mask=held[:, None] & inside,
                    other=0.0,
                )
                if not EVEN_K:
                    inside = inside & ((k0 + k + at) < K)[None, :]
                xt = tl.load(
                    x + m[:, None] * K + (k0 + k + at)[None, :],
                    mask=(i < count)[:, None] & inside,
                    other=0.0,
                )
                acc = tl.dot(w, tl.trans(xt), acc, input_precision="ieee")
        total += acc * tl.load(strengths + e)
    own = (i < count)[None, :] & (n < out_features)[:, None]
    place = planes + (plane * MP + m)[None, :].to(tl.int64) * N + (column + n)[:, None]
    tl.store(place, total, mask=own)
