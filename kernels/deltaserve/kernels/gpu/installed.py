"""An adapter's parts as the planner reads them, with tagged offsets (see tags.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from deltaserve.kernels.gpu.prepared import GpuPrepared, Part
from deltaserve.kernels.gpu.tags import Tagged, tag
from deltaserve.kernels.lowrank.pages import PAGE

RECENT = 32
"""Structures that are kept, of the adapters that were installed last."""

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False, slots=True)
class Pages:
    """One entry per page, modules one after the other; col: the page's first row of h."""

    a: Tagged
    b: Tagged
    part: Ints
    gathers: Ints
    col: Ints
    scale: Floats

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True, eq=False, slots=True)
class Installed:
    """signs, sells, panels: part -> entries of 4 numbers as the kernels read them; panel_tiles:
    part -> chunks of each tile, summed over panels; the rest: part -> vectors' offsets."""

    pages: Pages
    signs: dict[int, list[tuple[int, int, int, int]]]
    sells: dict[int, tuple[int, int, int, int]]
    panels: dict[int, list[tuple[int, int, int, int]]]
    panel_tiles: dict[int, Ints]
    factors: dict[int, tuple[int, ...]]
    biases: dict[int, tuple[int, ...]]
    inputs: dict[int, int]
    replaced: dict[int, int]


def install(prepared: GpuPrepared, slot: int) -> Installed:
    """slot: that the offsets are tagged with. One object for all groups of an adapter that have the
    same parts: the engine's thread makes it for a layer, not for each."""
    return _installed(_Same(prepared.parts), slot)


class _Same:
    """Parts, told by identity: comparing them would take as long as using them."""

    __slots__ = ("parts",)

    def __init__(self, parts: Mapping[int, Part]) -> None:
        self.parts = parts

    def __hash__(self) -> int:
        return id(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.parts is self.parts


@lru_cache(maxsize=RECENT)
def _installed(same: _Same, slot: int) -> Installed:
    own, blob = same.parts, tag(slot)
    return Installed(
        pages=_pages(own, blob),
        signs={
            i: [(blob + s.words, blob + s.scales, s.planes, 0) for s in p.signs]
            for i, p in own.items()
            if p.signs
        },
        sells={
            i: (
                blob + p.sell.starts,
                blob + p.sell.rows,
                blob + p.sell.columns,
                blob + p.sell.values,
            )
            for i, p in own.items()
            if p.sell is not None
        },
        panels={
            i: [(blob + q.starts, blob + q.chunks, blob, 0) for q in p.panels]
            for i, p in own.items()
            if p.panels
        },
        panel_tiles={
            i: np.sum([q.tiles for q in p.panels], axis=0, dtype=np.int32)
            for i, p in own.items()
            if p.panels
        },
        factors={i: tuple(blob + v for v in p.factors) for i, p in own.items() if p.factors},
        biases={i: tuple(blob + v for v in p.biases) for i, p in own.items() if p.biases},
        inputs={i: blob + p.input for i, p in own.items() if p.input is not None},
        replaced={i: blob + p.replaced for i, p in own.items() if p.replaced is not None},
    )


def _pages(parts: Mapping[int, Part], blob: int) -> Pages:
    flat = [(i, page) for i, part in parts.items() for page in part.pages]

    def ints(values: list[int]) -> Ints:
        return np.array(values, dtype=np.int32)

    return Pages(
        a=np.array([blob + page.a for _, page in flat], dtype=np.int64),
        b=np.array([blob + page.b for _, page in flat], dtype=np.int64),
        part=ints([i for i, _ in flat]),
        gathers=ints([page.gathers for _, page in flat]),
        col=ints([PAGE * n for n in range(len(flat))]),
        scale=np.array([page.scale for _, page in flat], dtype=np.float32),
    )
