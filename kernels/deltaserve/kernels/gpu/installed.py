"""Installed: an adapter in some layers in which its rows have the same fields."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.rows import DELTAS, FIELDS, KINDS, NUMBERS, UNITS, Ints, Rows

OFFSETS = np.array([[i not in numbers for i in range(UNITS[DELTAS])] for numbers in NUMBERS])
"""Of each sort of DELTAS, which numbers are offsets."""


class Installed:
    """rows, spots: of each layer, one at least. fields: int32 [n, fields] of each kind. places:
    int32 [n, units, layers] of each kind, its offsets those in the arena."""

    def __init__(self, rows: Sequence[Rows], spots: Sequence[Spot]) -> None:
        first, layers = rows[0], len(rows)
        self.counts = first.counts
        self.fields: list[Ints] = []
        self.places: list[Ints] = []
        self._units: list[Ints] = []
        fields = np.frombuffer(first.fields, dtype=np.int32)
        units = np.frombuffer(b"".join(r.units for r in rows), dtype=np.int32)
        units = np.ascontiguousarray(units.reshape(layers, -1).T)
        field = unit = 0
        for kind in KINDS:
            n, width, own = self.counts[kind], FIELDS[kind], UNITS[kind]
            self.fields.append(fields[field : field + n * width].reshape(n, width))
            self._units.append(units[unit : unit + n * own].reshape(n, own, layers))
            field, unit = field + n * width, unit + n * own
        self._moved = OFFSETS[self.fields[DELTAS][:, 1]].astype(np.int32)[:, :, None]
        places = {id(spot.place): spot.place for spot in spots}
        number = {key: i for i, key in enumerate(places)}
        self._held_in = list(places.values())
        self._which = np.array([number[id(spot.place)] for spot in spots])
        self._behind = np.array([spot.units for spot in spots], dtype=np.int32)
        self._starts: list[int] = []
        self.moves = -1

    def follow(self, moves: int) -> None:
        """Reads anew where the blobs are. moves: of the arena until now."""
        self.moves = moves
        starts = [place.offset for place in self._held_in]
        if starts == self._starts:
            return
        self._starts = starts
        at = np.array(starts, dtype=np.int32)[self._which] + self._behind
        self.places = [units + at for units in self._units]
        self.places[DELTAS] = self._units[DELTAS] + self._moved * at


NOTHING = Installed([Rows.of({})], [])
