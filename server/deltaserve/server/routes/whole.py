"""Changes that are made whole, and noted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from deltaserve.server.errors import StateUnavailable
from deltaserve.server.state.records import Entry

if TYPE_CHECKING:
    from deltaserve.server.routes.shelf import Shelf

log = logging.getLogger(__name__)
T = TypeVar("T")


class Whole:
    """Changes run to their end also when the client goes away. Those that are refused are noted in
    the audit log. shelf: None has none. reason: what the client is told as the reason."""

    def __init__(self, shelf: Shelf | None, reason: Callable[[Exception], str]) -> None:
        self._shelf = shelf
        self._reason = reason
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, entry: Entry, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives."""
        task = asyncio.create_task(self._noted(entry, work))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _noted(self, entry: Entry, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except Exception as error:
            if self._shelf is not None and not isinstance(error, StateUnavailable):
                refused = replace(entry, outcome=self._reason(error), detail=str(error))
                try:
                    await self._shelf.note(refused)
                except StateUnavailable as unavailable:
                    log.warning("--state: %s was refused: %s", entry.verb, unavailable)
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # the client may have gone; it is noted already
