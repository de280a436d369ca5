"""Residents: what is in the slots of layers, as a step's plan needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.installed import NOTHING, Installed
from deltaserve.kernels.gpu.prepared import GpuPrepared
from deltaserve.kernels.gpu.rows import Rows
from deltaserve.kernels.gpu.united import united
from deltaserve.kernels.segments import Segments

FEW = 4
"""Structures of layers that are planned apart; of more, layers are taken to have what others have.
"""
KEPT = 16
"""Sets of layers that a slot is kept for, where an adapter is not alike in all of them."""


class Layer(Protocol):
    """A group of linears. slots, spots: what is in each slot and where. listeners: called with a
    slot when it changes."""

    arena: Arena
    slots: dict[int, GpuPrepared]
    spots: dict[int, Spot]
    listeners: list[Callable[[int], None]]


@dataclass(frozen=True, eq=False, slots=True)
class Alike:
    """Layers, by number, in which each adapter of a step has one structure. adapters: of each of
    the step's (run, adapter) entries. acts: whether any does something."""

    layers: tuple[int, ...]
    adapters: Sequence[Installed]
    acts: bool


class Residents:
    """layers: groups of one shape, over one arena. What has been read of a slot is kept until one
    of them changes it; what the arena moves is read anew. Engine thread."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.changes = 0
        self._all = tuple(range(len(layers)))
        self._arena = layers[0].arena
        self._slots: dict[int, _Slot] = {}
        for layer in layers:
            layer.listeners.append(self._forget)

    @property
    def version(self) -> tuple[int, int]:
        """The same as long as nothing is installed, removed or moved."""
        return self.changes, self._arena.moves

    def alike(self, segments: Segments, most: int = FEW) -> list[Alike]:
        """All layers, by what the step's adapters are in them; all together if there would be more
        than `most` kinds of them and no adapter has routers in some layers alone."""
        known, entries = self._slots, segments.slot.tolist()
        slots = [known.get(slot) or self._read(slot) for slot in entries]
        whole = [own for slot in slots if (own := slot.everywhere) is not None]
        if len(whole) == len(slots):
            return [self._of(self._all, whole)]
        kinds: dict[tuple[int, ...], list[int]] = {}
        for i, key in enumerate(zip(*(slot.kinds for slot in slots), strict=True)):
            kinds.setdefault(key, []).append(i)
        if len(kinds) > most:
            together = [own for slot in slots if (own := slot.together) is not None]
            if len(together) == len(slots):
                return [self._of(self._all, together)]
        return [
            self._of(layers, [slot.within(layers) for slot in slots])
            for layers in map(tuple, kinds.values())
        ]

    def _of(self, layers: tuple[int, ...], adapters: Sequence[Installed]) -> Alike:
        moves = self._arena.moves
        acts = False
        for adapter in adapters:
            acts = acts or adapter is not NOTHING
            if adapter.moves != moves:
                adapter.follow(self._arena)
        return Alike(layers, adapters, acts)

    def _read(self, slot: int) -> _Slot:
        found = _Slot(
            [layer.slots[slot].rows if slot in layer.slots else None for layer in self.layers],
            [layer.spots.get(slot) for layer in self.layers],
        )
        self._slots[slot] = found
        return found

    def _forget(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self.changes += 1


class _Slot:
    """What one slot holds. rows, spots: of each layer, None where it holds nothing. kinds: of each
    layer, the first one in which it is alike. everywhere: in all layers, if it is alike in all.
    together: in all layers, as if it were; None if it has routers in some."""

    def __init__(self, rows: Sequence[Rows | None], spots: Sequence[Spot | None]) -> None:
        self._rows = rows
        self._spots = spots
        self._found: dict[tuple[int, ...], Installed] = {}
        firsts: dict[tuple[tuple[int, ...], bytes] | None, int] = {}
        fields = (None if own is None else (own.counts, own.fields) for own in rows)
        self.kinds = tuple(firsts.setdefault(key, i) for i, key in enumerate(fields))
        self.everywhere = self.within(tuple(range(len(rows)))) if len(firsts) == 1 else None

    @cached_property
    def together(self) -> Installed | None:
        if self.everywhere is not None:
            return self.everywhere
        return united(self._rows, self._spots)

    def within(self, layers: tuple[int, ...]) -> Installed:
        """In some layers in which it is alike."""
        found = self._found.get(layers)
        if found is None:
            rows = [own for i in layers if (own := self._rows[i]) is not None]
            spots = [spot for i in layers if (spot := self._spots[i]) is not None]
            found = Installed.alike(rows, spots) if rows else NOTHING
            if len(self._found) == KEPT:
                self._found.clear()
            self._found[layers] = found
        return found
