"""Staging: adapters on their way to the device, in slices, beside the steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import Tensor

from deltaserve.kernels.gpu.streams import Event, Streams

SLICE = 4 << 20
RING = 16
"""Slices that may be on their way at once."""

Piece: TypeAlias = tuple[Tensor, Tensor]
"""uint8 in device memory, and as many in host memory that are to come there."""


class Landing:
    """Copies of some pieces. done: all of them have arrived, or, after `cancel`, those that had
    been launched have; only then may the memory be read, moved or given away."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._slices = _slices(pieces)
        self._next: Piece | None = next(self._slices, None)
        self._event: Event | None = None
        self.cancelled = False

    @property
    def launched(self) -> bool:
        return self._next is None

    @property
    def done(self) -> bool:
        """Asks the device; never waits for it."""
        return self.launched and (self._event is None or self._event.done())

    def cancel(self) -> None:
        """Launch no more."""
        self._next = None
        self.cancelled = True

    def launch(self, streams: Streams, ring: Ring) -> bool:
        """The next slice. False if the ring is full."""
        assert self._next is not None
        target, source = self._next
        if not source.is_pinned():
            slot = ring.take(source.numel())
            if slot is None:
                return False
            source = slot.copy_(source)
        streams.copy(target, source)
        self._event = ring.give(source, streams.record())
        self._next = next(self._slices, None)
        return True


class Ring:
    """Pinned memory in slices, each taken again once its copy is done."""

    def __init__(self, streams: Streams, slices: int, nbytes: int) -> None:
        memory = streams.pinned(slices * nbytes)
        self._free = cut(memory, nbytes)
        self._busy: deque[tuple[Tensor, Event]] = deque()
        self._taken: Tensor | None = None

    def take(self, nbytes: int) -> Tensor | None:
        """`nbytes` of a free slice, for one copy; None while all are on their way."""
        while self._busy and self._busy[0][1].done():
            self._free.append(self._busy.popleft()[0])
        if not self._free:
            return None
        self._taken = self._free.pop()
        return self._taken[:nbytes]

    def give(self, source: Tensor, event: Event) -> Event:
        """What was taken, if anything was, is free again after the event."""
        if self._taken is not None:
            self._busy.append((self._taken, event))
            self._taken = None
        return event


class Staging:
    """Copies what is prepared through a ring of pinned memory; what is pinned itself, directly. One
    after the other: the first is in use soonest that way. full: the last `pump` found no slice of
    the ring free.

    Its methods are called by the engine thread between steps and return at once: a slice is copied
    by the processor to the ring, and launched from there.
    """

    def __init__(self, streams: Streams, *, slices: int = RING, nbytes: int = SLICE) -> None:
        self.streams = streams
        self._ring = Ring(streams, slices, nbytes)
        self._nbytes = nbytes
        self._under_way: deque[Landing] = deque()
        self.full = False

    def begin(self, pieces: Sequence[Piece]) -> Landing:
        """The targets may have been given back by somebody whom launched steps still read."""
        slices = [
            piece
            for target, source in pieces
            for piece in zip(cut(target, self._nbytes), cut(source, self._nbytes), strict=True)
        ]
        landing = Landing(slices)
        if not landing.launched:
            self._under_way.append(landing)
            self.streams.after_steps()
        return landing

    def pump(self, slices: int = 1) -> bool:
        """Launch as many slices at most. Whether any is left to be launched."""
        self.full = False
        while self._under_way:
            first = self._under_way[0]
            if first.launched:
                self._under_way.popleft()
                continue
            if slices <= 0:
                return True
            self.full = not first.launch(self.streams, self._ring)
            if self.full:
                return True
            slices -= 1
        return False


def _slices(pieces: Sequence[Piece]) -> Iterator[Piece]:
    return (piece for piece in pieces if piece[1].numel())


def cut(memory: Tensor, nbytes: int) -> list[Tensor]:
    """Slices of `nbytes`, the last perhaps shorter."""
    return [memory[at : at + nbytes] for at in range(0, memory.numel(), nbytes)]
