"""Work items whose results are planes of ready deltas: 1-bit tiles, panels, sparse slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from deltaserve.kernels.bit.words import ROWS
from deltaserve.kernels.gpu.aux_kernel import BIT, PANEL, SELL
from deltaserve.kernels.gpu.installed import Installed, Ints
from deltaserve.kernels.gpu.plan.tiling import NO_ITEMS, Slots, Tiling, work_items
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.sparse import panels, sell
from deltaserve.kernels.table import Group

Wanted: TypeAlias = tuple[int, int, int, int, int]
"""(start, end) of a run, a module, (first, last) of their entries."""


class DeltaItems:
    """Items whose results are planes of ready deltas: 1-bit tiles, panels, sparse slices."""

    def __init__(
        self, group: Group, slots: Slots, segments: Segments, tiles: int, tiling: Tiling
    ) -> None:
        self.group = group
        self.tiling = tiling
        self.entries: list[tuple[int, int, int, int]] = []
        self.strengths: list[float] = []
        self.count = np.zeros((len(group.out_features), tiles * tiling.tokens), dtype=np.int32)
        bits = self._wanted(segments, slots, lambda own, part: own.signs.get(part, ()))
        found = self._wanted(segments, slots, lambda own, part: own.panels.get(part, ()))
        single = self._wanted(
            segments, slots, lambda own, part: [own.sells[part]] if part in own.sells else ()
        )
        self.bits = self._bits(bits)
        self.panels = self._panels(found)
        self.sells = self._sells(single)

    def _wanted(
        self,
        segments: Segments,
        slots: Slots,
        of: Callable[[Installed, int], object],
    ) -> list[Wanted]:
        """Each run and module that has any."""
        wanted = []
        for start, end, mix in segments.runs:
            own = [(slots[slot], w) for slot, w in mix if slot in slots]
            for part in range(len(self.group.out_features)):
                first = len(self.entries)
                for installed, w in own:
                    rows = list(of(installed, part))  # type: ignore[call-overload]
                    self.entries += rows
                    self.strengths += [w] * len(rows)
                if len(self.entries) > first:
                    wanted.append((start, end, part, first, len(self.entries)))
        return wanted

    def _place(self, part: int, start: int, end: int, planes: int) -> int:
        """The first of `planes` new planes of these tokens and this module."""
        plane = int(self.count[part, start])
        self.count[part, start:end] += planes
        return plane

    def _spread(self, tiles: int, limit: int) -> tuple[int, int]:
        """(row tiles of an item, pieces of its sum) so that every program has something to do and
        the list stays short. tiles: of all runs together; limit: pieces at most."""
        programs = self.tiling.programs
        return max(1, tiles // (8 * programs)), max(1, min(limit, 4, programs // max(tiles, 1)))

    def _bits(self, wanted: list[Wanted]) -> Ints:
        found = [NO_ITEMS]
        inner, depth = self.group.in_features, self.tiling.depth
        together, pieces = self._spread(
            self._tiles_of(wanted, ROWS),
            -(-inner // (4 * depth)),
        )
        step = -(-inner // (pieces * depth)) * depth // 128
        whole = -(-inner // 128)
        pieces = -(-whole // step)
        for start, end, part, first, last in wanted:
            plane = self._place(part, start, end, pieces)
            tiles = self._tiles(part, ROWS)
            for piece in range(pieces):
                span = (piece * step, min((piece + 1) * step, whole))
                found.append(self._tiled(BIT.value, tiles, start, end, part, first, last, together))
                found[-1][:, 8] = plane + piece
                found[-1][:, 9:11] = span
        return np.concatenate(found)

    def _panels(self, wanted: list[Wanted]) -> Ints:
        found = [NO_ITEMS]
        together, pieces = self._spread(
            self._tiles_of(wanted, panels.TILE),
            -(-self.group.in_features // panels.CHUNK),
        )
        for start, end, part, first, last in wanted:
            plane = self._place(part, start, end, pieces)
            tiles = self._tiles(part, panels.TILE)
            for piece in range(pieces):
                found.append(
                    self._tiled(PANEL.value, tiles, start, end, part, first, last, together)
                )
                found[-1][:, 8] = plane + piece
                found[-1][:, 9:11] = piece, pieces
        return np.concatenate(found)

    def _tiled(
        self, kind: int, tiles: int, start: int, end: int, part: int, first: int, last: int,
        together: int,
    ) -> Ints:  # fmt: skip
        """Items of `together` of the row tiles each, for blocks of the run's tokens."""
        tile = np.arange(0, tiles, together)
        m0 = np.arange(start, end, self.tiling.block)
        count = np.minimum(self.tiling.block, end - m0)
        column, rows = self.group.columns(part).start, self.group.out_features[part]
        items = work_items(
            [
                kind, np.tile(m0, len(tile)), np.tile(count, len(tile)), first, last,
                np.repeat(tile, len(m0)), column, rows,
            ],
            len(tile) * len(m0),
        )  # fmt: skip
        items[:, 11] = np.minimum(together, tiles - items[:, 5])
        return items

    def _sells(self, wanted: list[Wanted]) -> Ints:
        found = [NO_ITEMS]
        step, window = self.tiling.gathers, sell.WINDOW // sell.ROWS
        for start, end, part, first, last in wanted:
            slices = -(-self.group.out_features[part] // sell.ROWS)
            together = window if last - first > 1 else max(1, slices // (4 * self.tiling.programs))
            s = np.arange(0, slices, together)
            m0 = np.arange(start // step, -(-end // step))
            column, rows = self.group.columns(part).start, self.group.out_features[part]
            columns: list[Ints | int] = [
                SELL.value, np.tile(m0, len(s)), start, end, first, last, column, rows,
                self._place(part, start, end, 1), np.repeat(s, len(m0)),
                np.repeat(np.minimum(s + together, slices), len(m0)),
            ]  # fmt: skip
            found.append(work_items(columns, len(s) * len(m0)))
        return np.concatenate(found)

    def _tiles(self, part: int, rows: int) -> int:
        return -(-self.group.out_features[part] // rows)

    def _tiles_of(self, wanted: Sequence[Wanted], rows: int) -> int:
        """Row tiles of all runs together, counted once for each block of tokens."""
        return sum(
            self._tiles(part, rows) * -(-(end - start) // self.tiling.block)
            for start, end, part, _, _ in wanted
        )
