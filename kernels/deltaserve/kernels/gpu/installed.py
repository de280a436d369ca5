"""Installed: an adapter in some layers, as the planner reads it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaserve.kernels.gpu.arena import NOWHERE, Arena
from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.rows import (
    BIAS,
    DELTAS,
    FIELDS,
    KINDS,
    NUMBERS,
    OUTPUTS,
    PAGES,
    UNITS,
    Ints,
    Rows,
)

MOVED = {
    kind: np.array([[i not in own for i in range(UNITS[kind])] for own in numbers], np.int32)
    for kind, numbers in NUMBERS.items()
}
"""By kind and what the second field says: which units are offsets."""


class Installed:
    """fields: int32 [n, fields] of each kind. units: int32 [n, units, layers] of each kind. there:
    bool [n, layers] of each kind, whether the layer has the row; None if each has every row. spots:
    of each layer, None of one that has none. places: units, the offsets among them those in the
    arena; of pages and biases that a layer has not, of zeros, of factors of ones; of other deltas,
    `NOWHERE`."""

    def __init__(
        self,
        fields: Sequence[Ints],
        units: Sequence[Ints],
        spots: Sequence[Spot | None],
        there: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.fields = fields
        self.counts = tuple(map(len, fields))
        self.places: list[Ints] = []
        self._units = list(units)
        self._moved: list[Ints | None] = []
        for kind in KINDS:
            moved = moved_of(kind, fields[kind])[:, :, None] if kind in NUMBERS else None
            self._moved.append(moved)
        held = [spot for spot in spots if spot is not None]
        places = {id(spot.place): spot.place for spot in held}
        number = {key: i for i, key in enumerate(places)}
        self._held_in = list(places.values())
        self._which = np.array([0 if s is None else number[id(s.place)] for s in spots], np.int64)
        self._behind = np.array([0 if s is None else s.units for s in spots], dtype=np.int32)
        self._lacking = None if there is None else [~own[:, None, :] for own in there]
        self._starts: list[int] | None = None
        self.moves = -1

    @classmethod
    def alike(cls, rows: Sequence[Rows], spots: Sequence[Spot]) -> Installed:
        """In layers in which its rows have the same fields. rows, spots: of each, one at least."""
        first, layers = rows[0], len(rows)
        joined = np.frombuffer(b"".join(r.units for r in rows), dtype=np.int32)
        joined = np.ascontiguousarray(joined.reshape(layers, -1).T)
        units, at = [], 0
        for kind in KINDS:
            n, own = first.counts[kind], UNITS[kind]
            units.append(joined[at : at + n * own].reshape(n, own, layers))
            at += n * own
        return cls(fields_of(first), units, spots)

    def follow(self, arena: Arena) -> None:
        """Reads anew where the blobs are."""
        self.moves = arena.moves
        starts = [*(place.offset for place in self._held_in), arena.zeros]
        if starts == self._starts:
            return
        self._starts = starts
        at = np.array(starts, dtype=np.int32)[self._which] + self._behind
        self.places = [
            units + (at if moved is None else moved * at)
            for units, moved in zip(self._units, self._moved, strict=True)
        ]
        for kind, lacking in enumerate(self._lacking or ()):
            instead = _neutral(kind, self.fields[kind], arena)[:, :, None]
            self.places[kind] = np.where(lacking, instead, self.places[kind])


def _neutral(kind: int, fields: Ints, arena: Arena) -> Ints:
    """int32 [n, units]: what rows that a layer has not are given."""
    moved = moved_of(kind, fields)
    if kind == DELTAS:
        return moved * np.int32(NOWHERE)
    at = np.full(len(fields), arena.ones, np.int32)
    if kind == PAGES:
        at[:] = arena.zeros
    elif kind == OUTPUTS:
        at[fields[:, 1] == BIAS] = arena.zeros
    return moved * at[:, None]


def moved_of(kind: int, fields: Ints) -> Ints:
    """int32 [n, units] of rows of these fields: 1 for an offset, 0 for a number."""
    if kind not in MOVED:
        return np.ones((len(fields), UNITS[kind]), np.int32)
    return MOVED[kind][fields[:, 1]]


def fields_of(rows: Rows) -> list[Ints]:
    """Of each kind, int32 [n, fields]."""
    return _split(rows.counts, rows.fields, FIELDS)


def units_of(rows: Rows) -> list[Ints]:
    """Of each kind, int32 [n, units]."""
    return _split(rows.counts, rows.units, UNITS)


def _split(counts: Sequence[int], numbers: bytes, widths: Sequence[int]) -> list[Ints]:
    found, at, flat = [], 0, np.frombuffer(numbers, dtype=np.int32)
    for n, width in zip(counts, widths, strict=True):
        found.append(flat[at : at + n * width].reshape(n, width))
        at += n * width
    return found


NOTHING = Installed.alike([Rows.of({})], [])
"""In any layers."""
