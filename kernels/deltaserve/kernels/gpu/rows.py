"""Rows: an adapter's parts in one group as the planner reads them, numbers in a few arrays.

There is a row for every page, 1-bit delta, panel, sparse delta, vector and router. Its fields say
what it is: they decide how the tables of a step look. Its units say where it lies in the blob (and
what else the kernels want to know of it): they are only copied into the tables. So layers whose
rows have the same fields can share a plan, wherever in their blobs what lies, and layers that lack
some rows of others too: kernels read zeros or ones for those, or pass over what lies `NOWHERE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from deltaserve.kernels.gpu.parts import Part
from deltaserve.kernels.lowrank.pages import Page

Ints: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]

PAGES, DELTAS, OUTPUTS, INPUTS, GATES = KINDS = range(5)

FIELDS = (2, 2, 2, 3, 5)
"""Numbers that each kind's rows have, the module first. PAGES: SHRUNK, GATHERED or, of a router's
rows, ROUTER. DELTAS: SIGNS, PANEL or SELL. OUTPUTS: FACTOR, REPLACED or
BIAS. INPUTS: FACTOR or REPLACED; the first row that lies in the same place. GATES: experts, rows of
each, and among the adapter's pages the number of the experts' first one and of the router's."""

SHRUNK, GATHERED, ROUTER = range(3)
SIGNS, PANEL, SELL = range(3)
FACTOR, REPLACED, BIAS = range(3)

UNITS = (3, 4, 1, 1, 0)
"""Numbers that tell the kernels where a row of each kind lies: a page's a and b, and the bits of
its scale; an entry of another delta; a vector. They are offsets, all but those of `NUMBERS`."""

NUMBERS: dict[int, tuple[tuple[int, ...], ...]] = {
    PAGES: ((2,), (2,), (2,)),
    DELTAS: ((2, 3), (3,), ()),
}
"""Of what the second field says: a page's scale; the number of sign planes, and what is not used,
of entries."""

Row: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Fields and units."""


@dataclass(frozen=True, slots=True)
class Rows:
    """counts: rows of each kind. fields, units: int32, of all kinds in order, row by row."""

    counts: tuple[int, ...]
    fields: bytes
    units: bytes

    @staticmethod
    def of(parts: Mapping[int, Part]) -> Rows:
        """Of modules by their number; the rows of a kind in the modules' order."""
        found: tuple[list[Row], ...] = tuple([] for _ in KINDS)
        for i, part in sorted(parts.items()):
            for kind, row in _rows(i, part, found[PAGES], found[INPUTS]):
                found[kind].append(row)
        fields = [n for rows in found for row, _ in rows for n in row]
        units = [n for rows in found for _, row in rows for n in row]
        return Rows(
            tuple(map(len, found)),
            np.array(fields, dtype=np.int32).tobytes(),
            np.array(units, dtype=np.int32).tobytes(),
        )


def _rows(i: int, part: Part, pages: list[Row], inputs: list[Row]) -> Iterator[tuple[int, Row]]:
    """The rows of one module by their kind. pages, inputs: of the modules before, to which those of
    this one are added as they come."""
    first = len(pages)
    for page in part.pages:
        yield PAGES, ((i, GATHERED if page.gathers else SHRUNK), (page.a, page.b, _bits(page)))
    for gate in part.gates:
        yield GATES, ((i, gate.experts, gate.rank, first + gate.first, len(pages)), ())
        for page in gate.pages:
            yield PAGES, ((i, ROUTER), (page.a, page.b, _bits(page)))
    for s in part.signs:
        yield DELTAS, ((i, SIGNS), (s.words, s.scales, s.planes, 0))
    for panel in part.panels:
        yield DELTAS, ((i, PANEL), (panel.starts, panel.chunks, 0, 0))
    if part.sell is not None:
        sell = part.sell
        yield DELTAS, ((i, SELL), (sell.starts, sell.rows, sell.columns, sell.values))
    for at in part.factors:
        yield OUTPUTS, ((i, FACTOR), (at,))
    if part.replaced is not None:
        yield OUTPUTS, ((i, REPLACED), (part.replaced,))
    for at in part.biases:
        yield OUTPUTS, ((i, BIAS), (at,))
    for which, vector in ((FACTOR, part.input), (REPLACED, part.replaced)):
        if vector is not None:
            places = [units for _, units in inputs]
            same = places.index((vector,)) if (vector,) in places else len(places)
            yield INPUTS, ((i, which, same), (vector,))


def _bits(page: Page) -> int:
    return int(np.float32(page.scale).view(np.int32))
