"""Reads a plan's tables as the kernels do, and says, token by token and page by page, what must be
in them: written apart from the planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.segments import Mix, Segments

SHRINK, GATHER, BIT, SELL, PANEL = 0, 1, 2, 3, 4
BIT_ROWS, PANEL_ROWS, SLICE_ROWS, WINDOW_ROWS, LINE = 128, 64, 32, 256, 128


def listed(plan: StepPlan, name: str, fields: Sequence[str], key: int) -> list[tuple]:
    """The rows of one key of a table in order."""
    first, last = plan.tables[f"{name}_bounds"].tolist()[key : key + 2]
    columns = [plan.tables[f"{name}_{field}"].tolist()[first:last] for field in fields]
    return list(zip(*columns, strict=True))


def single(number: float) -> float:
    """As float32 has it."""
    return float(np.float32(number))


class Expected:
    """One layer's adapters in one step. tokens: of a tile."""

    def __init__(self, deltas: GpuLinearDeltas, segments: Segments, tokens: int) -> None:
        self.deltas, self.segments, self.tokens = deltas, segments, tokens

    def _own(self, mix: Mix) -> list[tuple[int, Mapping[int, Any], float]]:
        """(where the blob is, parts, strength) of the adapters that are there."""
        found = []
        for slot, strength in mix:
            if slot in self.deltas.slots:
                spot = self.deltas.spots[slot]
                at = spot.place.offset + spot.units
                found.append((at, self.deltas.slots[slot].parts, single(strength)))
        return found

    def _runs(self, tile: int) -> Iterator[tuple[int, int, Mix]]:
        """Those with tokens in a tile."""
        for start, end, mix in self.segments.runs:
            if any(tile * self.tokens <= t < (tile + 1) * self.tokens for t in range(start, end)):
                yield start, end, mix

    def pages(self, tile: int, part: int) -> list[tuple]:
        """(a, b, first row of h, tokens from, to, scale), those that gather last."""
        found = []
        for start, end, mix in self._runs(tile):
            row = 0
            for at, parts, strength in self._own(mix):
                for number in sorted(parts):
                    for page in parts[number].pages:
                        if number == part:
                            scale = single(np.float32(page.scale) * np.float32(strength))
                            numbers = (at + page.a, at + page.b, row, start, end, scale)
                            found.append((page.gathers, numbers))
                        row += 8
        return [n for gathers in (False, True) for g, n in found if g == gathers]

    def _scales_inputs(self, mix: Mix, part: int) -> bool:
        return any(
            part in parts and parts[part].input is not None for _, parts, _ in self._own(mix)
        )

    def vectors(self, tile: int, part: int, biases: bool) -> list[tuple]:
        """(offset, tokens from, to, strength)."""
        found = []
        for start, end, mix in self._runs(tile):
            replaced = []
            for at, parts, strength in self._own(mix):
                own = parts.get(part)
                if own is None:
                    continue
                for offset in own.biases if biases else own.factors:
                    found.append((at + offset, start, end, strength))
                if own.replaced is not None and not biases:
                    replaced.append((at + own.replaced, start, end, strength))
            if not self._scales_inputs(mix, part):
                found += replaced
        return found

    def inputs(self, tile: int, part: int) -> list[tuple]:
        found = []
        for start, end, mix in self._runs(tile):
            if self._scales_inputs(mix, part):
                for name in ("input", "replaced"):
                    for at, parts, strength in self._own(mix):
                        offset = getattr(parts[part], name) if part in parts else None
                        if offset is not None:
                            found.append((at + offset, start, end, strength))
        return found

    def entries(self, kind: int, mix: Mix, part: int) -> list[tuple]:
        """(its four numbers, strength) of each 1-bit, sparse or panel delta."""
        found: list[tuple] = []
        for at, parts, strength in self._own(mix):
            own = parts.get(part)
            if own is None:
                continue
            if kind == BIT:
                found += [((at + s.words, at + s.scales, s.planes, 0), strength) for s in own.signs]
            elif kind == PANEL:
                found += [((at + p.starts, at + p.chunks, at, 0), strength) for p in own.panels]
            elif own.sell is not None:
                s = own.sell
                offsets = tuple(at + n for n in (s.starts, s.rows, s.columns, s.values))
                found.append((offsets, strength))
        return found


def check(plan: StepPlan, deltas: GpuLinearDeltas, segments: Segments) -> None:
    """Everything in a layer's tables, and nothing else."""
    tiling, parts = plan.tiling, len(deltas.group.out_features)
    expected = Expected(deltas, segments, tiling.tokens)
    tiles = -(-segments.tokens // tiling.tokens)
    names = ("a", "b", "col", "lo", "hi", "scale")
    plain = ("offset", "lo", "hi", "strength")
    for tile in range(plan.tiles):
        for part in range(parts):
            key = tile * parts + part
            wanted = expected.pages(tile, part) if tile < tiles else []
            assert listed(plan, "page", names, key) == wanted
            for biases in (False, True):
                wanted = expected.vectors(tile, part, biases)
                assert listed(plan, "vec", plain, 2 * key + biases) == wanted
            if plan.uses.apart or part == 0:
                wanted = expected.inputs(tile, part)
                assert listed(plan, "in", plain, key) == wanted
            elif plan.uses.scaled:  # one list for all
                assert [row[1:] for row in expected.inputs(tile, part)] == [
                    row[1:] for row in expected.inputs(tile, 0)
                ]
    items = plan.tables["items"][: 12 * int(plan.n_items[0])].view(-1, 12).tolist()
    _check_shrinks(plan, deltas, expected, items)
    _check_deltas(plan, deltas, expected, items)


def _check_shrinks(
    plan: StepPlan, deltas: GpuLinearDeltas, expected: Expected, items: list[list[int]]
) -> None:
    """Each page meets each token block of its tile and each line of columns once."""
    tiling, parts = plan.tiling, len(deltas.group.out_features)
    bounds = plan.tables["page_bounds"].tolist()
    blocks, lines = tiling.tokens // tiling.block, -(-deltas.group.in_features // LINE)
    wanted: Counter = Counter()
    for key in range(plan.tiles * parts):
        tile, part = divmod(key, parts)
        own = expected.pages(tile, part)
        assert bounds[key + 1] - bounds[key] == len(own)
        gathering = _gathering(deltas, expected, tile, part)
        for i in range(len(own)):
            for block in range(tile * blocks, (tile + 1) * blocks):
                if i >= len(own) - gathering:
                    wanted[GATHER, bounds[key] + i, block, 0] += 1
                    continue
                for line in range(lines):
                    wanted[SHRINK, bounds[key] + i, block, line] += 1
    found: Counter = Counter()
    splits: dict[int, int] = {}
    for kind, first, last, block, begin, end, split, *_ in items:
        if kind in (SHRINK, GATHER):
            assert last - first <= tiling.rows // 8
            for page in range(first, last):
                for line in range(begin, end) if kind == SHRINK else (0,):
                    found[kind, page, block, line] += 1
                    if kind == SHRINK:
                        assert splits.setdefault(line, split) == split < tiling.h_split
    assert found == wanted


def _gathering(deltas: GpuLinearDeltas, expected: Expected, tile: int, part: int) -> int:
    return sum(
        page.gathers
        for _, _, mix in expected._runs(tile)
        for slot, _ in mix
        if slot in deltas.slots and part in deltas.slots[slot].parts
        for page in deltas.slots[slot].parts[part].pages
    )


def _check_deltas(
    plan: StepPlan, deltas: GpuLinearDeltas, expected: Expected, items: list[list[int]]
) -> None:
    """Each run and module: all tokens, rows and columns of a kind once, in planes that no other
    kind or piece of theirs has; as many as are counted."""
    outs = deltas.group.out_features
    columns = {sum(outs[:p]): p for p in range(len(outs))}
    numbers = plan.tables["entries"]
    numbers = numbers[: len(numbers) // 4 * 4].view(-1, 4).tolist()
    strengths = plan.tables["strengths"].tolist()
    lines = -(-deltas.group.in_features // LINE)
    found: dict[tuple[int, int, int], Counter] = {}
    planes: dict[tuple[int, int], set[tuple[int, int, int]]] = {}
    shared: dict[tuple[int, int], int] = {}  # pieces that a panel's sum is in
    listed: dict[tuple[int, int, int], list] = {}
    for kind, *item in items:
        if kind in (SHRINK, GATHER):
            continue
        if kind == SELL:
            first, start, end, at, last, column, rows, plane, u, v, _ = item
            first *= plan.tiling.gathers
            span = range(max(first, start), min(first + plan.tiling.gathers, end))
            tiles, shares, which = range(u, v), range(1), 0
        else:
            start, count, at, last, tile, column, rows, plane, u, v, together = item
            span, tiles = range(start, start + count), range(tile, tile + together)
            shares, which = (range(u, v), u) if kind == BIT else (range(u, u + 1), u)
        part = columns[column]
        assert rows == outs[part] and span
        (run,) = [r for r in expected.segments.runs if r[0] <= span[0] and span[-1] < r[1]]
        own = [(tuple(n), s) for n, s in zip(numbers[at:last], strengths[at:last], strict=True)]
        key = (kind, run[0], part)
        assert listed.setdefault(key, own) == own
        if kind == SELL and len(own) > 1:  # no other program writes the rest of a window
            assert u * SLICE_ROWS % WINDOW_ROWS == 0
            assert v * SLICE_ROWS % WINDOW_ROWS == 0 or v == -(-rows // SLICE_ROWS)
        if kind == PANEL:
            assert shared.setdefault((run[0], part), v) == v > u
        counter = found.setdefault(key, Counter())
        counter.update(product(span, tiles, shares))
        for token in span:
            planes.setdefault((part, token), set()).add((plane, kind, which))
    counts = plan.tables["plane_count"].view(len(outs), -1).tolist()
    for part in range(len(outs)):
        for token in range(plan.padded):
            taken = planes.get((part, token), set())
            # planes 0, 1, ... and each of one kind and piece
            assert sorted(plane for plane, *_ in taken) == list(range(counts[part][token]))
    for start, end, mix in expected.segments.runs:
        for part, rows in enumerate(outs):
            for kind, high in ((BIT, BIT_ROWS), (PANEL, PANEL_ROWS), (SELL, SLICE_ROWS)):
                wanted = expected.entries(kind, mix, part)
                assert listed.pop((kind, start, part), []) == wanted
                pieces = {BIT: lines, PANEL: shared.get((start, part), 0), SELL: 1}[kind]
                every = range(start, end), range(-(-rows // high)), range(pieces)
                counter = found.pop((kind, start, part), Counter())
                assert counter == Counter(product(*every) if wanted else ())
    assert not listed and not found
