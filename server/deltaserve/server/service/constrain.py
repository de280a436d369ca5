"""Constraints of requests, compiled on threads of their own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from deltaserve.server.engine.constraint import Constraint

if TYPE_CHECKING:
    from deltaserve.server.engine.matcher import Grammars, Matcher
    from deltaserve.server.engine.text import Text

THREADS = 2


class Constrainer:
    """What takes long to compile holds up others that compile, for a bounded time, and nobody
    else. text: the base's; what adapters bring is indexed when it is first needed, and forgotten
    with them. vocabulary, eos: of the model."""

    def __init__(self, text: Text, vocabulary: int, eos: Iterable[int]) -> None:
        self._vocabulary = vocabulary
        self._eos = tuple(eos)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="deltaserve-compile")
        self._lock = threading.Lock()
        self._own: WeakKeyDictionary[Text, Grammars] = WeakKeyDictionary()
        self._base = text
        self._grammars = self._index(text)

    async def matchers(
        self, constraint: Constraint | None, count: int, text: Text
    ) -> list[Matcher | None]:
        """One for each of `count` requests. Raises InvalidRequest."""
        if constraint is None:
            return [None] * count
        loop = asyncio.get_running_loop()
        return [*await loop.run_in_executor(self._threads, self._made, constraint, count, text)]

    def close(self) -> None:
        """End the threads and the processes that they use."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for grammars in (self._grammars, *self._own.values()):
                grammars.close()

    def _made(self, constraint: Constraint, count: int, text: Text) -> list[Matcher]:
        if text is self._base:
            return self._grammars.matchers(constraint, count)
        with self._lock:
            grammars = self._own.get(text)
            if grammars is None:
                grammars = self._own[text] = self._index(text)
                weakref.finalize(text, grammars.close)
        return grammars.matchers(constraint, count)

    def _index(self, text: Text) -> Grammars:
        return text.grammars(self._vocabulary, self._eos)
