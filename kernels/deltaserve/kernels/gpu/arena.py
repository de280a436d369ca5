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


NOWHERE = -1
"""In place of an offset: there is nothing."""


class OutOfArena(MemoryError):
    """A blob does not fit in an arena that may not grow."""


@dataclass(eq=False, slots=True)
class Place:
    """Units [offset, offset + units) of an arena, somebody's until all `users` have dropped it.

    start: units between it and the arena's far end. held: as `Arena.hold` was told. Otherwise
    `offset` changes when the arena makes room: read it anew for every step.
    """

    start: int
    units: int
    offset: int = 0
    users: int = 1
    held: bool = False

    @property
    def end(self) -> int:
        """Units between its lowest address and the arena's far end."""
        return self.start + self.units


class Arena:
    """First fit from the far end, the highest address, down: something else may grow from the
    lowest one up. Kernels see it through views of several types.

    Behind the far end lie zeros and ones, as many as `have_neutral` was asked for, for kernels to
    read in place of what an adapter has not.

    nbytes: size at first. grows: whether a full arena becomes a larger one, which moves it: graphs
    captured over a growing arena must be captured again. One that may not grow takes every blob
    that fits by bytes: where free memory is in pieces, it moves the blobs between them, in the
    order of the current stream, after the steps that were launched and before those to come.
    Used by the engine thread alone. moves: changes whenever the offset of any place does.
    """

    def __init__(self, device: torch.device, nbytes: int = 1 << 16, grows: bool = True) -> None:
        self.device = device
        self.grows = grows
        self.moves = 0
        self._zeros = self._ones = 0  # units
        self._data = self._allocate(-(-nbytes // LINE) * ALIGN)
        self._limit = self._top
        self._places: list[Place] = []  # ascending by start
        self._held: set[Place] = set()
        self._used = 0

    @property
    def units(self) -> int:
        """Size in units of 16 bytes, of what may be used."""
        return self._limit

    @property
    def used(self) -> int:
        """Bytes taken by blobs, rounded up to whole cache lines."""
        return self._used * UNIT

    @property
    def stuck(self) -> int:
        """Bytes below which there is no limit while held places stay where they are."""
        return max((place.end for place in self._held), default=0) * UNIT

    @property
    def end(self) -> int:
        """Bytes from the lowest place's start to the arena's far end."""
        return self._end * UNIT

    @property
    def _end(self) -> int:
        return self._places[-1].end if self._places else 0

    @property
    def zeros(self) -> int:
        """Offset of the zeros, until the arena moves."""
        return self._top

    @property
    def ones(self) -> int:
        """Offset of the ones, until the arena moves."""
        return self._top + self._zeros

    @property
    def neutral(self) -> int:
        """Bytes of zeros and ones."""
        return (self._zeros + self._ones) * UNIT

    @property
    def _top(self) -> int:
        """The far end of what places are in, in units."""
        return self._data.numel() // UNIT - self._zeros - self._ones

    def have_neutral(self, zeros: int, ones: int) -> None:
        """At least so many bytes of zeros and so many ones of float32. Raises OutOfArena if it may
        not grow and is not empty, or too small."""
        wanted = [-(-nbytes // LINE) * ALIGN for nbytes in (zeros, 4 * ones)]
        wanted = [max(pair) for pair in zip(wanted, (self._zeros, self._ones), strict=True)]
        more = sum(wanted) - self._zeros - self._ones
        if not more:
            return
        data = self._data
        if self.grows:
            data = self._allocate(self._top + sum(wanted))
        elif self._places or self._limit < max(self._top, more):
            raise OutOfArena(f"{more * UNIT} bytes of zeros and ones in an arena that is in use")
        self._lie_in(data, *wanted)

    def view(self, dtype: torch.dtype) -> Tensor:
        """The whole arena as a flat tensor of a type."""
        return self._data.view(dtype)

    def adopt(self, memory: Tensor) -> None:
        """Grow no more: lie at the end of this memory from now on, with what is in the arena.
        memory: uint8, contiguous, of whole cache lines, not cleared; as much of it is used as
        offsets can tell. Raises OutOfArena if it is too little."""
        data = memory[-min(memory.numel(), MOST * UNIT) :]
        units = (data.numel() - self.neutral) // UNIT
        if self._least() > units:
            raise OutOfArena(f"{self.used} bytes of blobs do not fit in {units * UNIT}")
        if self._end > units:
            self._slide(units)
        self._lie_in(data, self._zeros, self._ones)
        self.grows = False

    def reserve(self, nbytes: int) -> Place:
        """Room for a blob, moving others if need be. Raises OutOfArena."""
        units = max(1, -(-nbytes // LINE)) * ALIGN
        start = self._fit(units)
        if start is None and not self.grows:
            start = self._make_room(units)
        if start is None and self.grows:
            more = self._allocate(self._data.numel() // UNIT + self._top + units)
            self._lie_in(more, self._zeros, self._ones)
            start = self._fit(units)
        if start is None:
            held = " while others are being copied to" if self._limit - self._used >= units else ""
            raise OutOfArena(
                f"{units * UNIT} bytes do not fit in an arena of {self._limit * UNIT} of which "
                f"{self.used} are taken{held}"
            )
        place = Place(start, units)
        self._put(place)
        self._used += units
        return place

    def put(self, blob: Tensor) -> Place:
        """Copies a uint8 blob in. Raises OutOfArena."""
        place = self.reserve(blob.numel())
        self.bytes_of(place)[: blob.numel()].copy_(blob, non_blocking=True)
        return place

    def bytes_of(self, place: Place) -> Tensor:
        """uint8 [units * 16], where the blob lies now."""
        return self._span(place.start, place.units)

    def hold(self, place: Place, held: bool) -> None:
        """held: something that the arena does not know of writes to it (a copy on another stream),
        so it must stay."""
        place.held = held
        (self._held.add if held else self._held.discard)(place)

    def drop(self, place: Place) -> bool:
        """One user less; whether that was the last, which gives the memory back."""
        place.users -= 1
        if place.users:
            return False
        at = self._index(place.start)
        if at >= len(self._places) or self._places[at] is not place:
            raise ValueError("the place is not, or no more, one of this arena")
        del self._places[at]
        self._held.discard(place)
        self._used -= place.units
        return True

    def limit(self, nbytes: int) -> bool:
        """Use no more than the last `nbytes`, moving what lies before. False, and nothing moves, if
        what is there does not fit, or as long as a held place is in the way."""
        units = min(nbytes // LINE * ALIGN, self._top)
        if self._least() > units:
            return False
        self._limit = units
        while self._end > units:
            place = self._places[-1]
            start = self._fit(place.units)
            if start is None:
                self._slide(units)
            else:
                self._move(place, start)
        return True

    def check_integrity(self) -> None:
        """Raise if places overlap, lie outside or are counted wrongly."""
        if self._used != sum(p.units for p in self._places):
            raise AssertionError(f"{self._used} units counted")
        at = 0
        for place in self._places:
            if place.start < at or place.end > self._limit or place.start % ALIGN:
                raise AssertionError(f"{place} overlaps or lies outside")
            if place.offset + place.end != self._top:
                raise AssertionError(f"{place} is said to lie elsewhere")
            if place.users < 1:
                raise AssertionError(f"{place} is nobody's")
            at = place.end
        if self._held != {place for place in self._places if place.held}:
            raise AssertionError("places are held that are not known to be")

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """(start, units) of what is free behind each place in order, and before the last, within
        the limit."""
        at = 0
        for place in self._places:
            yield at, min(place.start, self._limit) - at
            at = place.end
        yield at, self._limit - at

    def _fit(self, units: int) -> int | None:
        return next((start for start, free in self._gaps() if free >= units), None)

    def _make_room(self, units: int) -> int | None:
        """Moves the fewest bytes that leave a gap of so many: neighbouring blobs without a held one
        between them, back onto each other."""
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

    def _least(self) -> int:
        """Units taken if every place lay on the one behind it; the held stay."""
        if not self._held:
            return self._used
        at = 0
        for place in self._places:
            at = place.end if place.held else at + place.units
        return at

    def _slide(self, units: int) -> None:
        """Moves as few of the places before the others back onto each other as leaves no more than
        `units` taken."""
        first, moved = len(self._places), 0
        at = self._end
        while first and at + moved > units and not self._places[first - 1].held:
            first -= 1
            moved += self._places[first].units
            at = self._places[first - 1].end if first else 0
        for place in self._places[first:]:
            self._move(place, at)
            at = place.end

    def _move(self, place: Place, start: int) -> None:
        """Back, to where nothing else lies."""
        if place.start == start:
            return
        self._copy(place.start, start, place.units)
        del self._places[self._index(place.start)]
        place.start = start
        self._put(place)
        self.moves += 1

    def _put(self, place: Place) -> None:
        self._places.insert(self._index(place.start), place)
        place.offset = self._top - place.end

    def _copy(self, source: int, start: int, units: int) -> None:
        """Back, in pieces that do not overlap what they are copied to."""
        by = source - start
        step = max(by, BOUNCE)
        for at in range(0, units, step):
            count = min(step, units - at)
            piece = self._span(source + at, count)
            self._span(start + at, count).copy_(piece.clone() if count > by else piece)

    def _span(self, start: int, units: int) -> Tensor:
        end = (self._top - start) * UNIT
        return self._data[end - units * UNIT : end]

    def _index(self, start: int) -> int:
        return bisect_left(self._places, start, key=attrgetter("start"))

    def _lie_in(self, data: Tensor, zeros: int, ones: int) -> None:
        """What is in the arena, at the end of this memory, before so many units of zeros and of
        ones."""
        held = self._span(0, self._end)
        self._data, self._zeros, self._ones = data, zeros, ones
        self._limit = self._top
        self._span(0, self._end).copy_(held)
        data[self.zeros * UNIT : self.ones * UNIT] = 0
        data[self.ones * UNIT :].view(torch.float32).fill_(1)
        for place in self._places:
            place.offset = self._top - place.end
        self.moves += 1

    def _allocate(self, units: int) -> Tensor:
        # Zeros: a masked load may still touch what was never written.
        return torch.zeros(min(units, MOST) * UNIT, dtype=torch.uint8, device=self.device)
