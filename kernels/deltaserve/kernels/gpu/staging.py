"""Staging: adapters on their way to the device, in slices, beside the steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from deltaserve.kernels.gpu.streams import Event, Streams

SLICE = 4 << 20
RING = 16
"""Slices that may be on their way at once."""

Submit: TypeAlias = Callable[[Callable[[], None]], "Future[None]"]
"""Has it done, by a thread beside the steps'."""


def now(job: Callable[[], None]) -> Future[None]:
    """Does it before it returns."""
    done: Future[None] = Future()
    job()
    done.set_result(None)
    return done


@dataclass(frozen=True, slots=True)
class Slice:
    """target: uint8 in device memory. parts: in host memory, what comes there, one after the
    other."""

    target: Tensor
    parts: Sequence[Tensor]


class Landing:
    """Copies of some slices. done: all of them have arrived, or, after `cancel`, those that had
    been launched have; only then may the memory be read, moved or given away."""

    def __init__(self, slices: Iterator[Slice]) -> None:
        self._slices = slices
        self._next: Slice | None = next(slices, None)
        self._filled: tuple[Tensor, Future[None]] | None = None  # of the ring, for `_next`
        self._event: Event | None = None
        self.cancelled = False

    @property
    def launched(self) -> bool:
        return self._next is None

    @property
    def done(self) -> bool:
        """Asks the device; never waits for it."""
        return self.launched and (self._event is None or self._event.done())

    def cancel(self, ring: Ring) -> None:
        """Launch no more."""
        if self._filled is not None:
            ring.give(*self._filled)
        self._next = self._filled = None
        self.cancelled = True

    def fill(self, ring: Ring, submit: Submit) -> None:
        """Have the next slice copied to the ring, if it has to be, is not yet and there is room."""
        if self._next is None or self._filled is not None or self._direct:
            return
        slot = ring.take()
        if slot is not None:
            self._filled = slot, submit(partial(_fill, slot, self._next.parts))

    def launch(self, streams: Streams, ring: Ring) -> bool:
        """The next slice. False if it is not in the ring yet."""
        assert self._next is not None
        target = self._next.target
        if self._direct:
            streams.copy(target, self._next.parts[0])
            self._event = streams.record()
        elif self._filled is not None and self._filled[1].done():
            slot, filled = self._filled
            filled.result()  # raises what was raised there
            streams.copy(target, slot[: target.numel()])
            self._event = streams.record()
            ring.give(slot, self._event)
        else:
            return False
        self._filled, self._next = None, next(self._slices, None)
        return True

    @property
    def _direct(self) -> bool:
        """The next slice is in pinned memory already."""
        assert self._next is not None
        return len(self._next.parts) == 1 and self._next.parts[0].is_pinned()


class Ring:
    """Pinned memory in slices, each taken again once its copy is done."""

    def __init__(self, streams: Streams, slices: int, nbytes: int) -> None:
        memory = streams.pinned(slices * nbytes)
        self._free = cut(memory, nbytes)
        self._busy: deque[tuple[Tensor, Event]] = deque()

    def take(self) -> Tensor | None:
        """A free slice, until it is given back; None while there is none."""
        while self._busy and self._busy[0][1].done():
            self._free.append(self._busy.popleft()[0])
        return self._free.pop() if self._free else None

    def give(self, slot: Tensor, event: Event) -> None:
        """What was taken is free again after the event."""
        self._busy.append((slot, event))


class Staging:
    """Copies what is prepared through a ring of pinned memory; what is pinned itself, directly. One
    after the other: the first is in use soonest that way. submit: copies to the ring. full: the
    last `pump` left a slice because it is not in the ring yet.

    Its methods are called by the engine thread between steps and return at once: a slice is copied
    to the ring while a step runs, and launched from there after it.
    """

    def __init__(
        self, streams: Streams, *, slices: int = RING, nbytes: int = SLICE, submit: Submit = now
    ) -> None:
        self.streams = streams
        self._ring = Ring(streams, slices, nbytes)
        self._nbytes = nbytes
        self._submit = submit
        self._under_way: deque[Landing] = deque()
        self.full = False

    def begin(self, target: Tensor, parts: Sequence[Tensor]) -> Landing:
        """target: uint8 in device memory, which may have been given back by somebody whom launched
        steps still read. parts: uint8 in host memory, what comes there, one after the other."""
        landing = Landing(_slices(target, parts, self._nbytes))
        if not landing.launched:
            self._under_way.append(landing)
            self.streams.after_steps()
            self._fill()
        return landing

    def cancel(self, landing: Landing) -> None:
        """Launch no more of it."""
        landing.cancel(self._ring)

    def pump(self, slices: int = 1) -> bool:
        """Launch as many slices at most. Whether any is left to be launched."""
        self.full = False
        while slices > 0 and self._fill():
            self.full = not self._under_way[0].launch(self.streams, self._ring)
            if self.full:
                return True
            slices -= 1
        return self._fill()

    def _fill(self) -> bool:
        """The next slice. Whether there is one."""
        while self._under_way and self._under_way[0].launched:
            self._under_way.popleft()
        if self._under_way:
            self._under_way[0].fill(self._ring, self._submit)
        return bool(self._under_way)


def _fill(slot: Tensor, parts: Sequence[Tensor]) -> None:
    at = 0
    with torch.inference_mode():  # what the engine thread makes may be written in that alone
        for part in parts:
            slot[at : at + part.numel()].copy_(part)
            at += part.numel()


def _slices(target: Tensor, parts: Sequence[Tensor], nbytes: int) -> Iterator[Slice]:
    at, own, size = 0, list[Tensor](), 0
    for rest in parts:
        while rest.numel():
            own.append(rest[: nbytes - size])
            size += own[-1].numel()
            rest = rest[own[-1].numel() :]
            if size == nbytes:
                yield Slice(target[at : at + size], own)
                at, own, size = at + size, [], 0
    if own:
        yield Slice(target[at : at + size], own)


def cut(memory: Tensor, nbytes: int) -> list[Tensor]:
    """Slices of `nbytes`, the last perhaps shorter."""
    return [memory[at : at + nbytes] for at in range(0, memory.numel(), nbytes)]
