"""Traffic: how many calls run, through all doors, and whether new ones are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from deltaserve.server.errors import ShuttingDown

T = TypeVar("T")


class Traffic:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._draining = asyncio.Event()
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Take no new calls."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        """No new calls are taken."""
        return self._draining.is_set()

    def check(self) -> None:
        """ShuttingDown while draining."""
        if self.draining:
            raise ShuttingDown("the server is shutting down and takes no new calls")

    async def unless_draining(self, work: Awaitable[T]) -> T:
        """The result of what a new call waits for; ShuttingDown, and it is cancelled, when a drain
        begins before."""
        working = asyncio.ensure_future(work)
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait({working, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.check()
            return working.result()
        finally:
            working.cancel()
            draining.cancel()

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
