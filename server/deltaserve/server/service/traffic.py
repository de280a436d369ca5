"""Traffic: how many calls run, through all doors, and whether new ones are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from deltaserve.server.errors import ShuttingDown


class Traffic:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Take no new calls."""
        self._draining = True

    @property
    def draining(self) -> bool:
        """No new calls are taken."""
        return self._draining

    def check(self) -> None:
        """ShuttingDown while draining."""
        if self._draining:
            raise ShuttingDown("the server is shutting down and takes no new calls")

    async def idle(self) -> None:
        """Wait until no call is running."""
        await self._idle.wait()

    @contextmanager
    def running(self, *, endless: bool = False) -> Iterator[None]:
        """A call, from its arrival to its last byte. endless: a shutdown does not wait for it."""
        counted = not endless
        self._active += counted
        if self._active:
            self._idle.clear()
        try:
            yield
        finally:
            self._active -= counted
            if not self._active:
                self._idle.set()
