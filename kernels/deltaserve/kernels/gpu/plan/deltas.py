"""Work items whose results are planes of ready deltas: 1-bit tiles, panels, sparse slices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from deltaserve.kernels.bit.words import ROWS
from deltaserve.kernels.gpu import aux_kernel
from deltaserve.kernels.gpu.plan.adapters import Adapters, Found
from deltaserve.kernels.gpu.plan.tiling import (
    NO_ITEMS,
    Index,
    Tiling,
    bounds,
    repeated,
    sort,
    work_items,
)
from deltaserve.kernels.gpu.rows import DELTAS, PANEL, SELL, SIGNS, Floats, Ints
from deltaserve.kernels.sparse import panels, sell
from deltaserve.kernels.table import Group


@dataclass(frozen=True, eq=False, slots=True)
class _Wanted:
    """Each run and module that has deltas of a sort, runs first. first, last: of their entries.
    start, end: of the run. column, rows: of the module."""

    run: Index
    part: Index
    first: Index
    last: Index
    start: Index
    end: Index
    column: Index
    rows: Index


class DeltaItems:
    """bits, panels, sells: the items of each kind. entries: int32 [4 n, layers], four numbers of
    each. strengths: of each. count: [parts, tokens in whole tiles] planes of each token."""

    def __init__(self, group: Group, adapters: Adapters, tiles: int, tiling: Tiling) -> None:
        self._group, self._adapters, self._tiling = group, adapters, tiling
        self._outputs = np.array(group.out_features)
        self._columns = np.cumsum(self._outputs) - self._outputs
        # One run more than there are: of the tokens without any.
        self._planes = np.zeros((len(adapters.spans.starts) + 1, len(self._outputs)), np.int32)
        self.entries: Ints = np.zeros((0, adapters.layers), dtype=np.int32)
        self.strengths: Floats = np.zeros(0, dtype=np.float32)
        self.bits = self.panels = self.sells = NO_ITEMS
        self.count = np.zeros((len(self._outputs), tiles * tiling.tokens), dtype=np.int32)
        found = adapters.rows(DELTAS)
        if found is None:
            return
        wanted = self._list(found)
        if SIGNS in wanted:
            self.bits = self._bits(wanted[SIGNS])
        if PANEL in wanted:
            self.panels = self._panels(wanted[PANEL])
        if SELL in wanted:
            self.sells = self._sells(wanted[SELL])
        owner = adapters.spans.owner
        self.count[:, : len(owner)] = self._planes[owner].T

    def _list(self, found: Found) -> dict[int, _Wanted]:
        """Lists the entries, one sort after the other; what is wanted of each sort there is."""
        adapters, parts, runs = self._adapters, len(self._outputs), len(self._planes)
        run = adapters.spans.run[found.entry]
        key = (found.fields[:, 1] * runs + run) * parts + found.part
        order = sort(key)
        key = key[order]
        self.entries = found.places[order].reshape(-1, adapters.layers)
        self.strengths = adapters.strength[found.entry[order]]
        first = np.concatenate(([0], np.flatnonzero(np.diff(key)) + 1))
        last = np.append(first[1:], len(key))
        rest, part = np.divmod(key[first], parts)
        which, run = np.divmod(rest, runs)
        columns = (
            run, part, first, last, adapters.spans.starts[run], adapters.spans.ends[run],
            self._columns[part], self._outputs[part],
        )  # fmt: skip
        ends = bounds(which, len((SIGNS, PANEL, SELL))).tolist()
        return {
            i: _Wanted(*(column[a:b] for column in columns))
            for i, (a, b) in enumerate(pairwise(ends))
            if a < b
        }

    def _place(self, wanted: _Wanted, planes: int) -> Ints:
        """The first of `planes` new planes of each."""
        where = wanted.run, wanted.part
        plane = self._planes[where]
        self._planes[where] = plane + planes
        return plane

    def _spread(self, tiles: int, limit: int) -> tuple[int, int]:
        """(row tiles of an item, pieces of its sum) so that every program has something to do and
        the list stays short. tiles: of all runs together; limit: pieces at most."""
        programs = self._tiling.programs
        return max(1, tiles // (8 * programs)), max(1, min(limit, 4, programs // max(tiles, 1)))

    def _bits(self, wanted: _Wanted) -> Ints:
        inner, depth = self._group.in_features, self._tiling.depth
        together, pieces = self._spread(self._tiles(wanted, ROWS), -(-inner // (4 * depth)))
        step = -(-inner // (pieces * depth)) * depth // 128
        whole = -(-inner // 128)
        pieces = -(-whole // step)
        items, piece = self._tiled(aux_kernel.BIT.value, wanted, ROWS, together, pieces)
        items[:, 9] = piece * step
        items[:, 10] = np.minimum((piece + 1) * step, whole)
        return items

    def _panels(self, wanted: _Wanted) -> Ints:
        limit = -(-self._group.in_features // panels.CHUNK)
        together, pieces = self._spread(self._tiles(wanted, panels.TILE), limit)
        items, piece = self._tiled(aux_kernel.PANEL.value, wanted, panels.TILE, together, pieces)
        items[:, 9], items[:, 10] = piece, pieces
        return items

    def _tiles(self, wanted: _Wanted, rows: int) -> int:
        """Row tiles of all runs together, counted once for each block of tokens."""
        blocks = -(-(wanted.end - wanted.start) // self._tiling.block)
        return int((-(-wanted.rows // rows) * blocks).sum())

    def _tiled(
        self, kind: int, wanted: _Wanted, rows: int, together: int, pieces: int
    ) -> tuple[Ints, Index]:
        """Items of `together` row tiles each, for blocks of the run's tokens, for each piece of the
        sum; which piece."""
        block = self._tiling.block
        tiles = -(-wanted.rows // rows)
        chunks, blocks = -(-tiles // together), -(-(wanted.end - wanted.start) // block)
        of, number = repeated(pieces * chunks * blocks)
        number, m0 = np.divmod(number, blocks[of])
        piece, tile = np.divmod(number, chunks[of])
        m0, tile = wanted.start[of] + m0 * block, tile * together
        items = work_items(
            [
                kind, m0, np.minimum(block, wanted.end[of] - m0), wanted.first[of],
                wanted.last[of], tile, wanted.column[of], wanted.rows[of],
                self._place(wanted, pieces)[of] + piece, 0, 0,
                np.minimum(together, tiles[of] - tile),
            ],
            len(of),
        )  # fmt: skip
        return items, piece

    def _sells(self, wanted: _Wanted) -> Ints:
        step, window = self._tiling.gathers, sell.WINDOW // sell.ROWS
        slices = -(-wanted.rows // sell.ROWS)
        # Several adapters write the same window of rows one after the other.
        alone = np.maximum(1, slices // (4 * self._tiling.programs))
        together = np.where(wanted.last - wanted.first > 1, window, alone)
        m0 = wanted.start // step
        blocks = -(-wanted.end // step) - m0
        of, number = repeated(-(-slices // together) * blocks)
        number, block = np.divmod(number, blocks[of])
        s = number * together[of]
        columns: list[Ints | Index | int] = [
            aux_kernel.SELL.value, m0[of] + block, wanted.start[of], wanted.end[of],
            wanted.first[of], wanted.last[of], wanted.column[of], wanted.rows[of],
            self._place(wanted, 1)[of], s, np.minimum(s + together[of], slices[of]),
        ]  # fmt: skip
        return work_items(columns, len(of))
