"""From the engine's thread to the streams of an event loop.

The engine hands over once per step; the loop sorts the outputs by stream. A stream keeps what its
client has not taken yet and gives it out in one piece, so a slow reader gets larger pieces and
never holds up anyone. With many streams, outputs are gathered for some milliseconds: one process
can write only so many messages a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from deltaserve.server.engine.core import Output

log = logging.getLogger(__name__)

FEW_STREAMS = 64
"""Up to so many, each step is sent at once."""
GATHER_SECONDS = 0.02
MESSAGES_PER_SECOND = 15_000
"""Of one process, from a measurement on two cores; more streams wait longer between pieces."""


class Stream:
    """The outputs of one call: of its n requests, by their ids."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        self.unfinished = set(ids)
        self.tokens = 0  # generated so far
        self._pending: list[Output] = []
        self._ready = asyncio.Event()
        self._started = False

    def put(self, output: Output) -> bool:
        """Keep the output; True if the client should have it at once."""
        self._pending.append(output)
        self.tokens += len(output.token_ids)
        urgent = not self._started or output.finish_reason is not None
        self._started = True
        if output.finish_reason is not None:
            self.unfinished.discard(output.request_id)
        return urgent

    @property
    def done(self) -> bool:
        """Every request has ended, and everything was taken."""
        return not self.unfinished and not self._pending

    def wake(self) -> None:
        """Let the writer have what is there."""
        if self._pending:
            self._ready.set()

    async def take(self) -> list[Output]:
        """Wait for what is new; all of it, in order."""
        await self._ready.wait()
        self._ready.clear()
        taken, self._pending = self._pending, []
        return taken


class LoopOutbox:
    """One per event loop. `deliver` is called on the engine's thread, the rest in the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: dict[str, Stream] = {}
        self._gathered: set[Stream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Requests that are in flight."""
        return len(self._streams)

    def ids(self) -> list[str]:
        """Of the requests that are in flight."""
        return list(self._streams)

    def open(self, ids: Sequence[str]) -> Stream:
        """A stream for requests that are about to be submitted."""
        stream = Stream(ids)
        for request_id in ids:
            self._streams[request_id] = stream
        return stream

    def close(self, stream: Stream) -> None:
        """Nobody reads it any more."""
        for request_id in stream.ids:
            self._streams.pop(request_id, None)
        self._gathered.discard(stream)

    def deliver(self, outputs: list[Output]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._sort, outputs)
        except RuntimeError:  # the loop is closed: no client is left
            log.debug("%d outputs after the end of the event loop", len(outputs))

    def _sort(self, outputs: list[Output]) -> None:
        few = len(self._streams) <= FEW_STREAMS
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if stream.put(output) or few:
                stream.wake()
            else:
                self._gathered.add(stream)
        if self._gathered and self._timer is None:
            wait = max(GATHER_SECONDS, len(self._streams) / MESSAGES_PER_SECOND)
            self._timer = self._loop.call_later(wait, self._flush)

    def _flush(self) -> None:
        self._timer = None
        gathered, self._gathered = self._gathered, set()
        for stream in gathered:
            stream.wake()
