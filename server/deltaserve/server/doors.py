"""Doors: every way into the server, opened together, drained together when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

from deltaserve.server.service.services import Services

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 1.0
"""For final statuses to reach their clients after the last call has ended."""


class Door(Protocol):
    """Takes calls for the services."""

    async def start(self) -> str:
        """Listen. -> where, as ``host:port``; empty for a door that may stay shut, and does."""

    async def unready(self) -> None:
        """New calls are refused from now on: tell those who ask for the server's health."""

    async def stop(self, grace: float) -> None:
        """Stop listening; calls that still run are cancelled after the grace, in seconds."""


class Doors:
    """The first one is the one that the server is known by."""

    def __init__(self, services: Services, doors: Sequence[Door], grace_seconds: float) -> None:
        self.services = services
        self._doors = doors
        self._grace_seconds = grace_seconds

    async def start(self) -> list[str]:
        """Open them. -> where each listens."""
        await self.services.start()
        return [await door.start() for door in self._doors]

    async def drain(self) -> bool:
        """Refuse what is new, wait for what runs. True if all of it ended within the grace."""
        for door in self._doors:
            await door.unready()
        finished = await self.services.drain(self._grace_seconds)
        if not finished:
            log.warning("some calls were still running after %g s", self._grace_seconds)
        return finished

    async def stop(self, grace: float = LAST_WORDS_SECONDS) -> None:
        """Close them; calls that still run are cancelled after the grace."""
        await asyncio.gather(*(door.stop(grace) for door in self._doors))
        await self.services.close()


async def serve_until_signal(
    doors: Doors, ready: Callable[[list[str]], None], dead: asyncio.Event | None = None
) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once. dead: the engine
    is, which is as a signal. -> exit code: 0 if every call could finish."""
    dead = dead or asyncio.Event()
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, on_signal)
    ready(await doors.start())
    ends = {asyncio.create_task(event.wait()) for event in (first, dead)}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    log.info("draining; a second signal stops at once")
    draining = asyncio.create_task(doors.drain())
    hurry = asyncio.create_task(second.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    finished = draining.done() and draining.result()
    draining.cancel()
    hurry.cancel()
    await doors.stop(LAST_WORDS_SECONDS if finished else 0)
    return 0 if finished and not dead.is_set() else 1
