"""An adapter in layers that have more and fewer of its rows: other ranks, other modules, none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.installed import Installed, fields_of, units_of
from deltaserve.kernels.gpu.rows import FIELDS, GATES, INPUTS, KINDS, UNITS, Ints, Rows


def united(rows: Sequence[Rows | None], spots: Sequence[Spot | None]) -> Installed | None:
    """As if every layer had what any of them has: a module's first page of one layer stands beside
    the first one of another, and so on, and what a layer lacks is neutral there. rows, spots:
    of each layer. None with routers, which tell pages by their number."""
    forms: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
    for layer, own in enumerate(rows):
        if own is not None:
            forms.setdefault((own.counts, own.fields), []).append(layer)
    if any(counts[GATES] for counts, _ in forms):
        return None
    members = list(forms.values())
    fields = [fields_of(_at(rows, layers[0])) for layers in members]
    units_in = {layer: units_of(own) for layer, own in enumerate(rows) if own is not None}
    all_fields, all_units, there = [], [], []
    for kind in KINDS:
        joined, numbers = _joined([own[kind] for own in fields], FIELDS[kind])
        if kind == INPUTS:
            joined = _shared(joined, [own[kind] for own in fields], numbers)
        units = np.zeros((len(joined), UNITS[kind], len(rows)), np.int32)
        here = np.zeros((len(joined), len(rows)), np.bool_)
        for layers, which in zip(members, numbers, strict=True):
            for layer in layers:
                units[which, :, layer] = units_in[layer][kind]
                here[which, layer] = True
        all_fields.append(joined)
        all_units.append(units)
        there.append(here)
    return Installed(all_fields, all_units, spots, there)


def _at(rows: Sequence[Rows | None], layer: int) -> Rows:
    found = rows[layer]
    assert found is not None
    return found


def _joined(fields: Sequence[Ints], width: int) -> tuple[Ints, list[Ints]]:
    """The fields of all rows that any form has, ordered by module; of each form, which rows its own
    are. Those of one module and sort stand for each other in the order they are in."""
    keys: dict[tuple[int, int, int], Ints] = {}
    named = []
    for own in fields:
        counts: dict[tuple[int, int], int] = {}
        names = []
        for row in own:
            sort = int(row[0]), int(row[1])
            names.append((*sort, counts.setdefault(sort, 0)))
            counts[sort] += 1
            keys.setdefault(names[-1], row)
        named.append(names)
    order = {key: i for i, key in enumerate(sorted(keys))}
    joined = np.array([keys[key] for key in order], np.int32).reshape(-1, width)
    return joined, [np.array([order[name] for name in names], np.int32) for names in named]


def _shared(joined: Ints, fields: Sequence[Ints], numbers: Sequence[Ints]) -> Ints:
    """Input vectors: two lie in the same place if every form has both there, or none of them."""
    said: list[set[int]] = [set() for _ in joined]
    forms: list[set[int]] = [set() for _ in joined]
    for form, (own, rows) in enumerate(zip(fields, numbers, strict=True)):
        for row, (_, _, same) in zip(rows.tolist(), own.tolist(), strict=True):
            said[row].add(int(rows[same]))
            forms[row].add(form)
    found = joined.copy()
    for i, where in enumerate(said):
        first = next(iter(where))
        found[i, 2] = first if len(where) == 1 and forms[first] == forms[i] else i
    return found
