"""Arena: device memory that adapters' blobs lie in, in units of 16 bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

UNIT = 16
ALIGN = 8
"""Blobs start at multiples of 128 bytes, a cache line."""
LINE = UNIT * ALIGN
MOST = 1 << 31
"""Units that offsets of 32 bits can tell: 32 GiB."""
BOUNCE = (8 << 20) // UNIT
"""Units copied at a time where a blob moves by less than that and would be copied over itself."""


class OutOfArena(MemoryError):
    """A blob does not fit in an arena that may not grow."""


@dataclass(eq=False, slots=True)
class Place:
    """Units [offset, offset + units) of an arena, somebody's until all `users` have dropped it.

    held: something that the arena does not know of writes to it (a copy on another stream), so it
    must stay. Otherwise `offset` changes when the arena makes room: read it anew for every step.
    """

    offset: int
    units: int
    users: int = 1
    held: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.units


class Arena:
    """First fit, from the lowest address. Kernels see it through views of several types.

    nbytes: size at first. grows: whether a full arena becomes a larger one, which moves it: graphs
    captured over a growing arena must be captured again. One that may not grow takes every blob
    that fits by bytes: where free memory is in pieces, it moves the blobs between them, in the
    order of the current stream, after the steps that were launched and before those to come.
    memory: uint8, contiguous, to lie in; it is not cleared. Used by the engine thread alone.
    """

    def __init__(
        self,
        device: torch.device,
        nbytes: int = 1 << 16,
        grows: bool = True,
        memory: Tensor | None = None,
    ) -> None:
        self.device = device
        self.grows = grows
        self.moves = 0
        self._data = self._allocate(-(-nbytes // LINE) * ALIGN) if memory is None else memory
        self._limit = min(self._data.numel() // LINE * ALIGN, MOST)
        self._places: list[Place] = []  # ascending
        self._used = 0

    @property
    def units(self) -> int:
        """Size in units of 16 bytes, of what may be used."""
        return self._limit

    @property
    def used(self) -> int:
        """Bytes taken by blobs, rounded up to whole cache lines."""
        return self._used * UNIT

    def view(self, dtype: torch.dtype) -> Tensor:
        """The whole arena as a flat tensor of a type."""
        return self._data.view(dtype)

    def fix(self, nbytes: int) -> None:
        """Grow no more: from now on there are `nbytes` beside what is in it, in one allocation."""
        end = max((place.end for place in self._places), default=0)
        old = self._data[: end * UNIT]
        self._data = self._allocate(end + -(-nbytes // LINE) * ALIGN)
        self._data[: old.numel()].copy_(old)
        self._limit = min(self._data.numel() // LINE * ALIGN, MOST)
        self.grows = False

    def reserve(self, nbytes: int) -> Place:
        """Room for a blob, moving others if need be. Raises OutOfArena."""
        units = max(1, -(-nbytes // LINE)) * ALIGN
        offset = self._fit(units)
        if offset is None and not self.grows:
            offset = self._make_room(units)
        if offset is None and self.grows:
            self._grow(units)
            offset = self._fit(units)
        if offset is None:
            held = " while others are being copied to" if self._limit - self._used >= units else ""
            raise OutOfArena(
                f"{units * UNIT} bytes do not fit in an arena of {self._limit * UNIT} of which "
                f"{self.used} are taken{held}"
            )
        place = Place(offset, units)
        self._places.insert(self._index(offset), place)
        self._used += units
        return place

    def put(self, blob: Tensor) -> Place:
        """Copies a uint8 blob in. Raises OutOfArena."""
        place = self.reserve(blob.numel())
        self.bytes_of(place)[: blob.numel()].copy_(blob, non_blocking=True)
        return place

    def bytes_of(self, place: Place) -> Tensor:
        """uint8 [units * 16], where the blob lies now."""
        return self._span(place.offset, place.units)

    def drop(self, place: Place) -> bool:
        """One user less; whether that was the last, which gives the memory back."""
        place.users -= 1
        if place.users:
            return False
        at = self._index(place.offset)
        if at >= len(self._places) or self._places[at] is not place:
            raise ValueError("the place is not, or no more, one of this arena")
        del self._places[at]
        self._used -= place.units
        return True

    def limit(self, nbytes: int) -> bool:
        """Use no more than the first `nbytes`, moving what lies beyond. False, and the limit
        stays, if what is there does not fit, or as long as a held place is in the way."""
        units = min(nbytes // LINE * ALIGN, self._data.numel() // LINE * ALIGN, MOST)
        beyond = [p for p in self._places if p.end > units]
        if self._used > units or any(p.held for p in beyond):
            return False
        before, self._limit = self._limit, units
        for place in beyond:
            offset = self._fit(place.units)
            if offset is not None:
                self._move(place, offset)
        if any(p.end > units for p in beyond):
            self._slide()
        if any(p.end > units for p in beyond):
            self._limit = before
        return self._limit == units

    def check_integrity(self) -> None:
        """Raise if places overlap, lie outside or are counted wrongly."""
        if self._used != sum(p.units for p in self._places):
            raise AssertionError(f"{self._used} units counted")
        at = 0
        for place in self._places:
            if place.offset < at or place.end > self._limit or place.offset % ALIGN:
                raise AssertionError(f"{place} overlaps or lies outside")
            if place.users < 1:
                raise AssertionError(f"{place} is nobody's")
            at = place.end

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """(start, units) of what is free below each place in order, and above the last, within the
        limit."""
        at = 0
        for place in self._places:
            yield at, min(place.offset, self._limit) - at
            at = place.end
        yield at, self._limit - at

    def _fit(self, units: int) -> int | None:
        return next((start for start, free in self._gaps() if free >= units), None)

    def _make_room(self, units: int) -> int | None:
        """Moves the fewest bytes that leave a gap of so many: neighbouring blobs without a held one
        between them, down onto each other."""
        places = self._places
        free = [n for _, n in self._gaps()]
        best: tuple[int, int, int] | None = None
        first = room = moved = 0
        for last in range(len(places) + 1):  # the gaps first..last, the blobs between them
            room += free[last]
            while room - free[first] >= units and first < last:
                room -= free[first]
                moved -= places[first].units
                first += 1
            if room >= units and (best is None or moved < best[0]):
                best = moved, first, last
            if last < len(places):
                moved += places[last].units
                if places[last].held:
                    first, room, moved = last + 1, 0, 0
        if best is None:
            return None
        _, first, last = best
        at = places[first - 1].end if first else 0
        for place in places[first:last]:  # the list changes, their order does not
            self._move(place, at)
            at = place.end
        return at

    def _slide(self) -> None:
        """Moves every place down onto the one before it."""
        at = 0
        for place in list(self._places):
            if not place.held:
                self._move(place, at)
            at = place.end

    def _move(self, place: Place, offset: int) -> None:
        """Down, to where nothing else lies."""
        if place.offset == offset:
            return
        self._copy(place.offset, offset, place.units)
        del self._places[self._index(place.offset)]
        place.offset = offset
        self._places.insert(self._index(offset), place)
        self.moves += 1

    def _copy(self, source: int, offset: int, units: int) -> None:
        """Down, in pieces that do not overlap what they are copied to."""
        by = source - offset
        step = max(by, BOUNCE)
        for at in range(0, units, step):
            count = min(step, units - at)
            piece = self._span(source + at, count)
            self._span(offset + at, count).copy_(piece.clone() if count > by else piece)

    def _span(self, offset: int, units: int) -> Tensor:
        return self._data[offset * UNIT : (offset + units) * UNIT]

    def _index(self, offset: int) -> int:
        return bisect_left(self._places, offset, key=attrgetter("offset"))

    def _grow(self, units: int) -> None:
        old = self._data
        self._data = self._allocate(2 * (old.numel() // UNIT) + units)
        self._data[: old.numel()].copy_(old)
        self._limit = min(self._data.numel() // LINE * ALIGN, MOST)

    def _allocate(self, units: int) -> Tensor:
        # Zeros: a masked load may still touch what was never written.
        return torch.zeros(units * UNIT, dtype=torch.uint8, device=self.device)
