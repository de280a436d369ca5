"""Pages of rank rows: by (token tile, module) for the expand, as work items for the shrink."""

from __future__ import annotations

import numpy as np

from deltaserve.kernels.gated.kernel import ENTRY
from deltaserve.kernels.gpu.aux_kernel import GATHER, SHRINK
from deltaserve.kernels.gpu.plan.adapters import Adapters
from deltaserve.kernels.gpu.plan.tiling import (
    NO_ITEMS,
    Index,
    Table,
    Tiling,
    bounds,
    repeated,
    sort,
    work_items,
)
from deltaserve.kernels.gpu.rows import GATES, PAGES, ROUTER, Ints
from deltaserve.kernels.lowrank.pages import PAGE
from deltaserve.kernels.table import Group


def lowrank_tables(
    group: Group, adapters: Adapters, tiles: int, tiling: Tiling
) -> tuple[Table, Ints, int]:
    """Pages by (tile, part), then those of routers by tile; the work items of the shrink; rows of
    h."""
    parts, found = len(group.out_features), adapters.rows(PAGES)
    if found is None:
        none, places = np.zeros(0, dtype=np.int32), np.zeros((0, adapters.layers), dtype=np.int32)
        empty: Table = {name: none for name in ("page_col", "page_lo", "page_hi")}
        empty |= {"page_a": places, "page_b": places, "page_scale": places.view(np.float32)}
        return {**empty, "page_bounds": np.zeros(tiles * parts + 1, dtype=np.int32)}, NO_ITEMS, 0
    counts = adapters.counts[:, PAGES]
    first = np.cumsum(counts) - counts
    # A run's adapters have their rows of h one after the other.
    number = np.arange(len(found.entry)) - first[adapters.spans.head[found.entry]]
    rows, tile = adapters.by_tile(found.entry)
    gathers, strength = found.fields[:, 1], adapters.strength[found.entry]
    key = tile * parts + found.part[rows]
    if adapters.rows(GATES) is not None:
        routers = gathers == ROUTER
        gathers, strength = gathers % ROUTER, np.where(routers, np.float32(1), strength)
        key = np.where(routers[rows], tiles * parts + tile, key)
    key = key * 2 + gathers[rows]
    order = sort(key)
    key, rows = key[order], rows[order]
    entry, places = found.entry[rows], found.places[rows]
    fields: Table = {
        "page_a": places[:, 0],
        "page_b": places[:, 1],
        "page_col": (PAGE * number[rows]).astype(np.int32),
        "page_lo": adapters.start[entry],
        "page_hi": adapters.end[entry],
        "page_scale": places[:, 2].view(np.float32) * strength[rows][:, None],
        "page_bounds": bounds(key >> 1, tiles * parts),
    }
    shrinks = _shrinks(tile[order] * 2 + gathers[rows], group.in_features, tiling)
    return fields, shrinks, PAGE * int(number.max() + 1)


def gate_entries(adapters: Adapters, tiling: Tiling) -> Ints:
    """int32 [entries, 8], as gated/kernel.py reads them."""
    found = adapters.rows(GATES)
    if found is None:
        return NO_GATES
    counts = adapters.counts[:, PAGES]
    before = np.cumsum(counts) - counts
    before -= before[adapters.spans.head]  # of the run's adapters alone
    rows, tile = adapters.by_tile(found.entry)
    entry, fields = found.entry[rows], found.fields[rows]
    gates = np.zeros((len(rows), ENTRY.value), dtype=np.int32)
    gates[:, 0] = np.maximum(adapters.start[entry], tile * tiling.tokens)
    gates[:, 1] = np.minimum(adapters.end[entry], (tile + 1) * tiling.tokens)
    gates[:, 2] = PAGE * (before[entry] + fields[:, 4])
    gates[:, 3] = fields[:, 1]
    gates[:, 4] = PAGE * (before[entry] + fields[:, 3])
    gates[:, 5] = fields[:, 2]
    return gates


NO_GATES = np.zeros((0, ENTRY.value), dtype=np.int32)


def _shrinks(kind: Index, in_features: int, tiling: Tiling) -> Ints:
    """Items over a list of pages; kind: 2 tile + whether it gathers. Chunks of neighbouring pages
    of one kind, modules mixed: they share their input."""
    size = tiling.rows // PAGE
    edges = np.flatnonzero(np.diff(kind)) + 1
    starts = np.concatenate(([0], edges))
    ends = np.concatenate((edges, [len(kind)]))
    chunk, number = repeated(-(-(ends - starts) // size))
    first = starts[chunk] + number * size
    last = np.minimum(first + size, ends[chunk])
    blocks = tiling.tokens // tiling.block
    m0 = kind[first] // 2 * blocks
    if blocks > 1:
        first, last = np.repeat(first, blocks), np.repeat(last, blocks)
        m0 = np.repeat(m0, blocks) + np.tile(np.arange(blocks), len(m0))
    gather = kind[first] % 2 == 1
    found = []
    if gather.any():
        own = first[gather], last[gather], m0[gather]
        found.append(work_items([GATHER.value, *own], len(own[0])))
        first, last, m0 = first[~gather], last[~gather], m0[~gather]
    whole = -(-in_features // 128)
    step = -(-whole // tiling.h_split)
    for s in range(tiling.h_split):
        begin, end = min(s * step, whole), min((s + 1) * step, whole)
        found.append(work_items([SHRINK.value, first, last, m0, begin, end, s], len(first)))
    return np.concatenate(found)
