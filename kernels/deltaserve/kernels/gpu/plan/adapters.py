"""Adapters: what a step's adapters have of each kind, each row with the tokens it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltaserve.kernels.gpu.installed import Installed
from deltaserve.kernels.gpu.plan.tiling import Index, repeated
from deltaserve.kernels.gpu.rows import KINDS, Ints
from deltaserve.kernels.segments import Segments


@dataclass(frozen=True, eq=False, slots=True)
class Spans:
    """A step's (run, adapter) entries. run: of each. head: the run's first entry. tile, tiles: the
    first token tile that it has tokens in, and how many. starts, ends: of the runs. owner: of each
    token its run, their number for those of none."""

    run: Index
    head: Index
    tile: Index
    tiles: Index
    starts: Index
    ends: Index
    owner: Index

    @staticmethod
    def of(segments: Segments, tokens: int) -> Spans:
        """tokens: of a tile. Kept with the segments, as all groups of linears want it."""
        key = (Spans, tokens)
        found: Spans | None = segments.plans.get(key)
        if found is None:
            found = segments.plans[key] = Spans._made(segments, tokens)
        return found

    @staticmethod
    def _made(segments: Segments, tokens: int) -> Spans:
        runs, sizes = segments.runs, np.array([len(mix) for _, _, mix in segments.runs], np.int64)
        run = np.repeat(np.arange(len(runs)), sizes)
        tile = segments.start.astype(np.int64) // tokens
        starts = np.array([start for start, _, _ in runs], dtype=np.int64)
        ends = np.array([end for _, end, _ in runs], dtype=np.int64)
        owner = np.full(segments.tokens, len(runs))
        of, step = repeated(ends - starts)
        owner[starts[of] + step] = of
        return Spans(
            run=run,
            head=(np.cumsum(sizes) - sizes)[run],
            tile=tile,
            tiles=(segments.end.astype(np.int64) - 1) // tokens + 1 - tile,
            starts=starts,
            ends=ends,
            owner=owner,
        )


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """Rows of one kind, in the order of the entries. entry: of each. fields: int32 [n, fields].
    places: int32 [n, units, layers]."""

    entry: Index
    fields: Ints
    places: Ints

    @property
    def part(self) -> Ints:
        """The module of each."""
        return self.fields[:, 0]


class Adapters:
    """installed: of each entry of the segments. counts: [entries, kinds] rows. layers: how many
    places every row has."""

    def __init__(
        self, segments: Segments, installed: Sequence[Installed], layers: int, tokens: int
    ) -> None:
        self.spans = Spans.of(segments, tokens)
        self.start, self.end = segments.start, segments.end
        self.strength = segments.strength
        self.layers = layers
        self._installed = installed
        counts = [adapter.counts for adapter in installed]
        self.counts = np.array(counts, dtype=np.int64).reshape(-1, len(KINDS))
        self._found: dict[int, Found | None] = {
            kind: None for kind, count in enumerate(self.counts.sum(0).tolist()) if not count
        }

    def rows(self, kind: int) -> Found | None:
        """None if there are none."""
        if kind not in self._found:
            self._found[kind] = self._rows(kind)
        return self._found[kind]

    def _rows(self, kind: int) -> Found:
        counts = self.counts[:, kind]
        own = [self._installed[i] for i in np.flatnonzero(counts).tolist()]
        return Found(
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([adapter.fields[kind] for adapter in own]),
            np.concatenate([adapter.places[kind] for adapter in own]),
        )

    def by_tile(self, entry: Index) -> tuple[Index, Index]:
        """Rows of these entries once for each token tile that their run has tokens in: the row, the
        tile."""
        tiles, first = self.spans.tiles[entry], self.spans.tile[entry]
        if tiles.max(initial=1) == 1:
            return np.arange(len(entry)), first
        of, step = repeated(tiles)
        return of, first[of] + step
