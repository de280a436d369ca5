"""Factors and biases of outputs, factors of inputs, by (token tile, module)."""

from __future__ import annotations

import numpy as np

from deltaserve.kernels.gpu.installed import Floats, Installed, Ints
from deltaserve.kernels.gpu.plan.tiling import Slots, Table, Tiling, token_tiles
from deltaserve.kernels.gpu.tags import Tagged
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group


def output_vectors(
    group: Group, slots: Slots, segments: Segments, tiles: int, tiling: Tiling
) -> Table:
    """Output factors and biases by (tile, part), the factors first."""
    parts = len(group.out_features)
    rows: list[tuple[int, int, int, int, float]] = []
    touched = [slots[s] for s in segments.slots if s in slots]
    some = any(a.factors or a.biases or a.replaced for a in touched)
    for start, end, mix in segments.runs if some else ():
        own = [(slots[slot], w) for slot, w in mix if slot in slots]
        for part in range(parts):
            found = [(0, v, w) for adapter, w in own for v in adapter.factors.get(part, ())]
            if not _scales_inputs(own, part):
                found += [(0, a.replaced[part], w) for a, w in own if part in a.replaced]
            found += [(1, v, w) for adapter, w in own for v in adapter.biases.get(part, ())]
            for tile in token_tiles(start, end, tiling) if found else ():
                key = (tile * parts + part) * 2
                rows += [(key + which, offset, start, end, w) for which, offset, w in found]
    names = ("vec_offset", "vec_lo", "vec_hi", "vec_strength", "vec_bounds")
    return dict(zip(names, _sorted(rows, tiles * parts * 2), strict=True))


def input_vectors(
    group: Group, slots: Slots, segments: Segments, tiles: int, tiling: Tiling, apart: bool
) -> tuple[Table, bool]:
    """Input factors by (tile, part), and whether the modules want inputs of their own.

    A replaced weight beside scaled inputs takes the base's product away on the side of the inputs:
    ``W (1 + w (s - 1) - v) x + v W' x``; with output factors, or none, on that of the outputs.
    """
    parts = len(group.out_features)
    found = []
    some = any(slots[s].inputs for s in segments.slots if s in slots)
    for start, end, mix in segments.runs if some else ():
        own = [(slots[slot], w) for slot, w in mix if slot in slots]
        lists = []
        for part in range(parts):
            wanted = [(a.inputs[part], w) for a, w in own if part in a.inputs]
            if wanted:
                wanted += [(a.replaced[part], w) for a, w in own if part in a.replaced]
            lists.append(wanted)
        if any(lists):
            found.append((start, end, lists))
            apart = apart or any(wanted != lists[0] for wanted in lists)
    rows = [
        (tile * parts + part, offset, start, end, w)
        for start, end, lists in found
        for part in range(parts if apart else 1)
        for offset, w in lists[part]
        for tile in token_tiles(start, end, tiling)
    ]
    names = ("in_offset", "in_lo", "in_hi", "in_strength", "in_bounds")
    return dict(zip(names, _sorted(rows, tiles * parts), strict=True)), apart


def _scales_inputs(own: list[tuple[Installed, float]], part: int) -> bool:
    return any(part in adapter.inputs for adapter, _ in own)


def _sorted(
    rows: list[tuple[int, int, int, int, float]], keys: int
) -> tuple[Tagged, Ints, Ints, Floats, Ints]:
    """(offset, lo, hi, strength, bounds by key)."""
    rows.sort(key=lambda row: row[0])
    offsets = np.array([row[1] for row in rows], dtype=np.int64)
    numbers = np.array([(row[0], *row[2:4]) for row in rows], dtype=np.int32).reshape(-1, 3)
    strengths = np.array([row[4] for row in rows], dtype=np.float32)
    bounds = np.searchsorted(numbers[:, 0], np.arange(keys + 1)).astype(np.int32)
    return offsets, numbers[:, 1], numbers[:, 2], strengths, bounds
