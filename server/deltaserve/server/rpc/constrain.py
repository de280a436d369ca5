"""Constraints of requests, compiled on threads of their own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from deltaserve.server.engine.constraint import Constraint, Grammars, Matcher

THREADS = 2


class Constrainer:
    """What takes long to compile holds up others that compile, for a bounded time, and nobody
    else."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="deltaserve-compile")

    async def matchers(self, constraint: Constraint | None, count: int) -> list[Matcher | None]:
        """One for each of `count` requests. Raises InvalidRequest."""
        if constraint is None:
            return [None] * count
        return [
            *await asyncio.get_running_loop().run_in_executor(
                self._threads, self._grammars.matchers, constraint, count
            )
        ]

    def close(self) -> None:
        """End the threads and the processes that they use."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()
