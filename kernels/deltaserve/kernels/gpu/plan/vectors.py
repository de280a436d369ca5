"""Factors and biases of outputs, factors of inputs, by (token tile, module)."""

from __future__ import annotations

import numpy as np

from deltaserve.kernels.gpu.plan.adapters import Adapters, Found
from deltaserve.kernels.gpu.plan.tiling import Index, Table, bounds, sort
from deltaserve.kernels.gpu.rows import BIAS, FACTOR, INPUTS, OUTPUTS, REPLACED
from deltaserve.kernels.table import Group


def output_vectors(group: Group, adapters: Adapters, tiles: int) -> Table:
    """Output factors and biases by (tile, part), the factors first."""
    parts, found = len(group.out_features), adapters.rows(OUTPUTS)
    if found is None:
        return _nothing("vec", adapters.layers, tiles * parts * 2)
    which = found.fields[:, 1]
    kept = np.arange(len(which))
    scaled = _scaled_inputs(group, adapters)
    if scaled is not None:  # it takes the base's product away on the side of the inputs
        there = scaled[adapters.spans.run[found.entry], found.part]
        kept = kept[(which != REPLACED) | ~there]
    rows, tile = adapters.by_tile(found.entry[kept])
    rows = kept[rows]
    key = (tile * parts + found.part[rows]) * 2 + (which[rows] == BIAS)
    return _listed("vec", adapters, found, rows, key, which, tiles * parts * 2)


def input_vectors(group: Group, adapters: Adapters, tiles: int, apart: bool) -> tuple[Table, bool]:
    """Input factors by (tile, part), and whether the modules want inputs of their own.

    A replaced weight beside scaled inputs takes the base's product away on the side of the inputs:
    ``W (1 + w (s - 1) - v) x + v W' x``; with output factors, or none, on that of the outputs.
    """
    parts, scaled = len(group.out_features), _scaled_inputs(group, adapters)
    found = adapters.rows(INPUTS) if scaled is not None else None
    if scaled is None or found is None:
        return _nothing("in", adapters.layers, tiles * parts), apart
    which = found.fields[:, 1]
    kept = np.flatnonzero(scaled[adapters.spans.run[found.entry], found.part])
    apart = apart or _differ(parts, adapters, found, kept)
    if not apart:
        kept = kept[found.part[kept] == 0]
    rows, tile = adapters.by_tile(found.entry[kept])
    rows = kept[rows]
    key = tile * parts + found.part[rows]
    return _listed("in", adapters, found, rows, key, which, tiles * parts), apart


def _scaled_inputs(group: Group, adapters: Adapters) -> np.ndarray | None:
    """bool [runs, parts]: whether an adapter of the run scales the module's inputs; None if none
    does anywhere."""
    found = adapters.rows(INPUTS)
    if found is None:
        return None
    own = found.fields[:, 1] == FACTOR
    if not own.any():
        return None
    scaled = np.zeros((len(adapters.spans.starts), len(group.out_features)), dtype=np.bool_)
    scaled[adapters.spans.run[found.entry[own]], found.part[own]] = True
    return scaled


def _differ(parts: int, adapters: Adapters, found: Found, kept: Index) -> bool:
    """Whether the lists of some modules differ in some run."""
    which, run = found.fields[kept, 1], adapters.spans.run[found.entry[kept]]
    kept = kept[np.lexsort((which, run))]
    lists = [
        np.column_stack((found.entry[own], found.fields[own, 1:]))
        for own in (kept[found.part[kept] == part] for part in range(parts))
    ]
    return not all(np.array_equal(lists[0], other) for other in lists[1:])


def _listed(
    name: str, adapters: Adapters, found: Found, rows: Index, key: Index,
    which: np.ndarray, keys: int,
) -> Table:  # fmt: skip
    """The rows by key; of one key by runs, and of one run what is replaced last."""
    entry = found.entry[rows]
    run = adapters.spans.run[entry]
    order = sort((key * len(adapters.spans.starts) + run) * 2 + (which[rows] == REPLACED))
    rows, entry = rows[order], entry[order]
    return {
        f"{name}_offset": found.places[rows, 0],
        f"{name}_lo": adapters.start[entry],
        f"{name}_hi": adapters.end[entry],
        f"{name}_strength": adapters.strength[entry],
        f"{name}_bounds": bounds(key[order], keys),
    }


def _nothing(name: str, layers: int, keys: int) -> Table:
    none = np.zeros(0, dtype=np.int32)
    return {
        f"{name}_offset": np.zeros((0, layers), dtype=np.int32),
        f"{name}_lo": none,
        f"{name}_hi": none,
        f"{name}_strength": none.view(np.float32),
        f"{name}_bounds": np.zeros(keys + 1, dtype=np.int32),
    }
