"""The tables of a step: which tokens which adapters' memory is for. Built on the host, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaserve.kernels.bit.words import ROWS
from deltaserve.kernels.gpu.aux_kernel import BIT, GATHER, ITEM, PANEL, SELL, SHRINK
from deltaserve.kernels.gpu.installed import Floats, Installed, Ints, Pages
from deltaserve.kernels.lowrank.pages import PAGE
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.kernels.sparse import panels, sell
from deltaserve.kernels.table import Group

Slots = Mapping[int, Installed]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the step's work is cut; the launches' constants, fixed by the number of tokens.

    tokens: of a tile of the base GEMM. block: tokens of an item. rows: rank rows of a shrink item.
    h_split: pieces that a shrink's sum is shared out in. depth: columns of a 1-bit step. gathers:
    tokens of a sparse item. programs: how many run at once, what work is spread over.
    """

    tokens: int
    block: int
    rows: int
    h_split: int
    depth: int
    gathers: int
    programs: int


@dataclass(frozen=True, eq=False, slots=True)
class Tables:
    """Everything that the launches read of the step, in host memory. width: rows of h."""

    items: Ints
    entries: Ints
    strengths: Floats
    page_a: Ints
    page_b: Ints
    page_col: Ints
    page_lo: Ints
    page_hi: Ints
    page_scale: Floats
    page_bounds: Ints
    vec_offset: Ints
    vec_lo: Ints
    vec_hi: Ints
    vec_strength: Floats
    vec_bounds: Ints
    in_offset: Ints
    in_lo: Ints
    in_hi: Ints
    in_strength: Floats
    in_bounds: Ints
    plane_count: Ints
    width: int
    planes: int
    turned: bool
    scaled: bool
    apart: bool


Table = dict[str, Any]
"""Some fields of `Tables`."""


def build(
    group: Group,
    slots: Slots,
    segments: Segments,
    tiles: int,
    tiling: Tiling,
    apart: bool = False,
) -> Tables:
    """tiles: token tiles that the tables are laid out for, at least those of the step. apart: list
    the modules' inputs apart even where they are the same."""
    pages, shrinks, width = _lowrank(group, slots, segments, tiles, tiling)
    work = _Deltas(group, slots, segments, tiles, tiling)
    vectors = _vectors(group, slots, segments, tiles, tiling)
    inputs = _inputs(group, slots, segments, tiles, tiling, apart)
    # The longest items first: what is left at the end should be short.
    items = np.concatenate([work.bits, work.panels, work.sells, shrinks])
    return Tables(
        items=items,
        entries=np.array(work.entries, dtype=np.int32).reshape(-1, 4),
        strengths=np.array(work.strengths, dtype=np.float32),
        **pages,
        **vectors,
        **inputs[0],
        plane_count=work.count,
        width=width,
        planes=int(work.count.max(initial=0)),
        turned=tiling.gathers > 1 and len(work.sells) > 0,
        scaled=len(inputs[0]["in_offset"]) > 0,
        apart=inputs[1],
    )


def _items(columns: list[Ints | int], count: int) -> Ints:
    """[count, 12] from the item's numbers, arrays or one for all."""
    items = np.zeros((count, ITEM.value), dtype=np.int32)
    for i, column in enumerate(columns):
        items[:, i] = column
    return items


NO_ITEMS = np.zeros((0, ITEM.value), dtype=np.int32)


def _lowrank(
    group: Group, slots: Slots, segments: Segments, tiles: int, tiling: Tiling
) -> tuple[Table, Ints, int]:
    """Pages by (tile, part), the work items of the shrink, rows of h."""
    pieces = [
        (tile, start, end, pages, w, col)
        for start, end, mix in segments.runs
        for pages, w, col in _stacked(mix, slots)
        for tile in _tiles(start, end, tiling)
    ]
    parts = len(group.out_features)
    width = max((col + PAGE * len(pages) for *_, pages, _, col in pieces), default=0)
    if not pieces:
        none, bounds = np.zeros(0, dtype=np.int32), np.zeros(tiles * parts + 1, dtype=np.int32)
        names = ("page_a", "page_b", "page_col", "page_lo", "page_hi")
        empty = {name: none for name in names}
        return {**empty, "page_scale": none.astype(np.float32), "page_bounds": bounds}, NO_ITEMS, 0
    lengths = [len(pages) for _, _, _, pages, _, _ in pieces]

    def spread(values: list[int] | list[float], dtype: type) -> np.ndarray:
        return np.repeat(np.array(values, dtype=dtype), lengths)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(pages, name) for _, _, _, pages, _, _ in pieces])

    tile = spread([p[0] for p in pieces], np.int32)
    part, gathers = joined("part"), joined("gathers")
    key = (tile * parts + part) * 2 + gathers
    order = np.argsort(key, kind="stable")
    key = key[order]
    fields: Table = {
        "page_a": joined("a")[order],
        "page_b": joined("b")[order],
        "page_col": (joined("col") + spread([p[5] for p in pieces], np.int32))[order],
        "page_lo": spread([p[1] for p in pieces], np.int32)[order],
        "page_hi": spread([p[2] for p in pieces], np.int32)[order],
        "page_scale": (joined("scale") * spread([p[4] for p in pieces], np.float32))[order],
        "page_bounds": np.searchsorted(key // 2, np.arange(tiles * parts + 1)).astype(np.int32),
    }
    shrinks = _shrinks(tile[order] * 2 + gathers[order], group.in_features, tiling)
    return fields, shrinks, width


def _stacked(mix: Mix, slots: Slots) -> Iterator[tuple[Pages, float, int]]:
    """(pages, strength, first row of h) of each adapter of a mix that has pages."""
    col = 0
    for slot, w in mix:
        own = slots.get(slot)
        if own is not None and len(own.pages):
            yield own.pages, w, col
            col += PAGE * len(own.pages)


def _shrinks(kind: Ints, in_features: int, tiling: Tiling) -> Ints:
    """Items over a list of pages; kind: 2 tile + whether it gathers. Chunks of neighbouring pages
    of one kind, modules mixed: they share their input."""
    size = tiling.rows // PAGE
    edges = np.flatnonzero(np.diff(kind)) + 1
    starts = np.concatenate(([0], edges))
    ends = np.concatenate((edges, [len(kind)]))
    first = np.concatenate([np.arange(a, b, size) for a, b in zip(starts, ends, strict=True)])
    last = np.minimum(first + size, np.repeat(ends, -(-(ends - starts) // size)))
    blocks = tiling.tokens // tiling.block
    m0 = kind[first] // 2 * blocks
    first, last = np.repeat(first, blocks), np.repeat(last, blocks)
    m0 = np.repeat(m0, blocks) + np.tile(np.arange(blocks), len(m0))
    gather = kind[first] % 2 == 1
    found = [_items([GATHER.value, first[gather], last[gather], m0[gather]], int(gather.sum()))]
    whole = -(-in_features // 128)
    step = -(-whole // tiling.h_split)
    for s in range(tiling.h_split):
        begin, end = min(s * step, whole), min((s + 1) * step, whole)
        columns = [SHRINK.value, first[~gather], last[~gather], m0[~gather], begin, end, s]
        found.append(_items(columns, int((~gather).sum())))
    return np.concatenate(found)


class _Deltas:
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
    ) -> list[tuple[int, int, int, int, int]]:
        """(start, end, part, first entry, last entry) of each run and module that has any."""
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
        return max(1, tiles // (8 * programs)), max(1, min(limit, 4, 2 * programs // max(tiles, 1)))

    def _bits(self, wanted: list[tuple[int, int, int, int, int]]) -> Ints:
        found = [NO_ITEMS]
        inner, depth = self.group.in_features, self.tiling.depth
        together, pieces = self._spread(
            sum(self._tiles(part) * self._blocks(start, end) for start, end, part, *_ in wanted),
            -(-inner // (4 * depth)),
        )
        step = -(-inner // (pieces * depth)) * depth // 128
        whole = -(-inner // 128)
        pieces = -(-whole // step)
        for start, end, part, first, last in wanted:
            plane = self._place(part, start, end, pieces)
            for piece in range(pieces):
                span = (piece * step, min((piece + 1) * step, whole))
                found.append(self._tiled(BIT.value, start, end, part, first, last, together))
                found[-1][:, 8] = plane + piece
                found[-1][:, 9:11] = span
        return np.concatenate(found)

    def _panels(self, wanted: list[tuple[int, int, int, int, int]]) -> Ints:
        found = [NO_ITEMS]
        together, pieces = self._spread(
            sum(self._tiles(part) * self._blocks(start, end) for start, end, part, *_ in wanted),
            -(-self.group.in_features // panels.CHUNK),
        )
        for start, end, part, first, last in wanted:
            plane = self._place(part, start, end, pieces)
            for piece in range(pieces):
                found.append(self._tiled(PANEL.value, start, end, part, first, last, together))
                found[-1][:, 8] = plane + piece
                found[-1][:, 9:11] = piece, pieces
        return np.concatenate(found)

    def _tiled(
        self, kind: int, start: int, end: int, part: int, first: int, last: int, together: int
    ) -> Ints:
        """Items of `together` row tiles each, for blocks of the run's tokens."""
        tiles = self._tiles(part)
        tile = np.arange(0, tiles, together)
        m0 = np.arange(start, end, self.tiling.block)
        count = np.minimum(self.tiling.block, end - m0)
        column, rows = self.group.columns(part).start, self.group.out_features[part]
        items = _items(
            [
                kind, np.tile(m0, len(tile)), np.tile(count, len(tile)), first, last,
                np.repeat(tile, len(m0)), column, rows,
            ],
            len(tile) * len(m0),
        )  # fmt: skip
        items[:, 11] = np.minimum(together, tiles - items[:, 5])
        return items

    def _sells(self, wanted: list[tuple[int, int, int, int, int]]) -> Ints:
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
            found.append(_items(columns, len(s) * len(m0)))
        return np.concatenate(found)

    def _tiles(self, part: int) -> int:
        return -(-self.group.out_features[part] // ROWS)

    def _blocks(self, start: int, end: int) -> int:
        return -(-(end - start) // self.tiling.block)


def _vectors(group: Group, slots: Slots, segments: Segments, tiles: int, tiling: Tiling) -> Table:
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
            for tile in _tiles(start, end, tiling) if found else ():
                key = (tile * parts + part) * 2
                rows += [(key + which, offset, start, end, w) for which, offset, w in found]
    names = ("vec_offset", "vec_lo", "vec_hi", "vec_strength", "vec_bounds")
    return dict(zip(names, _sorted(rows, tiles * parts * 2), strict=True))


def _inputs(
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
        for tile in _tiles(start, end, tiling)
    ]
    names = ("in_offset", "in_lo", "in_hi", "in_strength", "in_bounds")
    return dict(zip(names, _sorted(rows, tiles * parts), strict=True)), apart


def _scales_inputs(own: list[tuple[Installed, float]], part: int) -> bool:
    return any(part in adapter.inputs for adapter, _ in own)


def _tiles(start: int, end: int, tiling: Tiling) -> range:
    """The token tiles that a run has tokens in."""
    return range(start // tiling.tokens, (end - 1) // tiling.tokens + 1)


def _sorted(
    rows: list[tuple[int, int, int, int, float]], keys: int
) -> tuple[Ints, Ints, Ints, Floats, Ints]:
    """(offset, lo, hi, strength, bounds by key)."""
    rows.sort(key=lambda row: row[0])
    numbers = np.array([row[:4] for row in rows], dtype=np.int32).reshape(-1, 4)
    strengths = np.array([row[4] for row in rows], dtype=np.float32)
    bounds = np.searchsorted(numbers[:, 0], np.arange(keys + 1)).astype(np.int32)
    return numbers[:, 1], numbers[:, 2], numbers[:, 3], strengths, bounds
