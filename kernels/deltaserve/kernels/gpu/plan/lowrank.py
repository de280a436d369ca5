"""Pages of rank rows: by (token tile, module) for the expand, as work items for the shrink."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deltaserve.kernels.gpu.aux_kernel import GATHER, SHRINK
from deltaserve.kernels.gpu.installed import Ints, Pages
from deltaserve.kernels.gpu.plan.tiling import (
    NO_ITEMS,
    Slots,
    Table,
    Tiling,
    token_tiles,
    work_items,
)
from deltaserve.kernels.lowrank.pages import PAGE
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.kernels.table import Group


def lowrank_tables(
    group: Group, slots: Slots, segments: Segments, tiles: int, tiling: Tiling
) -> tuple[Table, Ints, int]:
    """Pages by (tile, part), the work items of the shrink, rows of h."""
    pieces = [
        (tile, start, end, pages, w, col)
        for start, end, mix in segments.runs
        for pages, w, col in _stacked(mix, slots)
        for tile in token_tiles(start, end, tiling)
    ]
    parts = len(group.out_features)
    width = max((col + PAGE * len(pages) for *_, pages, _, col in pieces), default=0)
    if not pieces:
        none, bounds = np.zeros(0, dtype=np.int32), np.zeros(tiles * parts + 1, dtype=np.int32)
        empty = {name: none for name in ("page_col", "page_lo", "page_hi")}
        empty |= {name: none.astype(np.int64) for name in ("page_a", "page_b")}
        return {**empty, "page_scale": none.astype(np.float32), "page_bounds": bounds}, NO_ITEMS, 0
    lengths = [len(pages) for _, _, _, pages, _, _ in pieces]

    def spread(values: list[int] | list[float], dtype: type) -> np.ndarray:
        return np.repeat(np.array(values, dtype=dtype), lengths)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(pages, name) for _, _, _, pages, _, _ in pieces])

    tile = spread([p[0] for p in pieces], np.int32)
    part, gathers = joined("part"), joined("gathers")
    key = (tile * parts + part) * 2 + gathers
    order = np.argsort(key, kind="stable")
    key = key[order]
    fields: Table = {
        "page_a": joined("a")[order],
        "page_b": joined("b")[order],
        "page_col": (joined("col") + spread([p[5] for p in pieces], np.int32))[order],
        "page_lo": spread([p[1] for p in pieces], np.int32)[order],
        "page_hi": spread([p[2] for p in pieces], np.int32)[order],
        "page_scale": (joined("scale") * spread([p[4] for p in pieces], np.float32))[order],
        "page_bounds": np.searchsorted(key // 2, np.arange(tiles * parts + 1)).astype(np.int32),
    }
    shrinks = _shrinks(tile[order] * 2 + gathers[order], group.in_features, tiling)
    return fields, shrinks, width


def _stacked(mix: Mix, slots: Slots) -> Iterator[tuple[Pages, float, int]]:
    """(pages, strength, first row of h) of each adapter of a mix that has pages."""
    col = 0
    for slot, w in mix:
        own = slots.get(slot)
        if own is not None and len(own.pages):
            yield own.pages, w, col
            col += PAGE * len(own.pages)


def _shrinks(kind: Ints, in_features: int, tiling: Tiling) -> Ints:
    """Items over a list of pages; kind: 2 tile + whether it gathers. Chunks of neighbouring pages
    of one kind, modules mixed: they share their input."""
    size = tiling.rows // PAGE
    edges = np.flatnonzero(np.diff(kind)) + 1
    starts = np.concatenate(([0], edges))
    ends = np.concatenate((edges, [len(kind)]))
    first = np.concatenate([np.arange(a, b, size) for a, b in zip(starts, ends, strict=True)])
    last = np.minimum(first + size, np.repeat(ends, -(-(ends - starts) // size)))
    blocks = tiling.tokens // tiling.block
    m0 = kind[first] // 2 * blocks
    first, last = np.repeat(first, blocks), np.repeat(last, blocks)
    m0 = np.repeat(m0, blocks) + np.tile(np.arange(blocks), len(m0))
    gather = kind[first] % 2 == 1
    found = [work_items([GATHER.value, first[gather], last[gather], m0[gather]], int(gather.sum()))]
    whole = -(-in_features // 128)
    step = -(-whole // tiling.h_split)
    for s in range(tiling.h_split):
        begin, end = min(s * step, whole), min((s + 1) * step, whole)
        columns = [SHRINK.value, first[~gather], last[~gather], m0[~gather], begin, end, s]
        found.append(work_items(columns, int((~gather).sum())))
    return np.concatenate(found)
