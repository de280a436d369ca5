"""Make: from an adapter's files to what is published, wherever that is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Protocol, TypeAlias

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.lowered_cache import LoweredCache
from deltaserve.adapters.options import LoadOptions
from deltaserve.server.engine.residency import Prepared

Read: TypeAlias = Callable[[str, LoadOptions, Adapter | None], Adapter]
"""uri, options, its parent's content -> Adapter."""


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one adapter. digest: what it was registered with, empty if that is not known."""

    uri: str
    options: LoadOptions
    digest: str = ""


Line: TypeAlias = tuple[Source, ...]
"""An adapter's parents, the nearest to the base first, then itself."""


class Wanted(Enum):
    DIGEST = 1
    CHECK = 2  # that it can be packed as well
    ALL = 3


@dataclass(slots=True)
class Made:
    """digests: of each of the line. adapter: without content, unless its digest alone was wanted.
    nbytes: as packed, 0 if it was not. seconds: of its stages. hit: it came from the cache; None if
    there is none. cached: the cache has it, or gets it."""

    digests: tuple[str, ...]
    adapter: Adapter | None = None
    prepared: Prepared | None = None
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    hit: bool | None = None
    cached: bool = False


class Make(Protocol):
    """Called on loader threads, several at once."""

    def __call__(self, line: Line, wanted: Wanted) -> Made: ...

    def finish(self) -> None:
        """What can be done once the result of the last call on this thread was handed on."""
        ...

    def close(self) -> None:
        """Have what is under way fail, where that can be done."""
        ...


class Packs(Protocol):
    """The model, or what packing needs to know of it."""

    def prepare(self, adapter: Adapter) -> Any: ...


class MakeHere:
    """Read, check, lower and pack it on the thread that calls. Parents are read anew: they need
    not be in memory. cache: of adapters that are slow to lower."""

    def __init__(self, read: Read, host: Packs, cache: LoweredCache | None = None) -> None:
        self._read = read
        self._host = host
        self._cache = cache
        self._later = threading.local()

    def __call__(self, line: Line, wanted: Wanted) -> Made:
        began, own = time.perf_counter(), time.thread_time()
        adapter, digests = self._found(line), tuple(source.digest for source in line)
        if adapter is None:
            adapter, digests = self._lowered(line)
        made = Made(digests)
        if self._cache is not None:
            spent = time.thread_time() - own
            made.hit = made.cached = self._cache.holds(adapter, line[-1].options)
            if not made.hit and self._cache.worthwhile(adapter, spent):
                made.cached = True
                self._later.job = partial(self._cache.keep, adapter, line[-1].options, spent)
        made.seconds["read"] = time.perf_counter() - began
        if wanted is Wanted.DIGEST:
            return made
        began = time.perf_counter()
        prepared: Prepared = self._host.prepare(adapter)
        made.adapter, made.nbytes = adapter.without_content(), prepared.nbytes
        if wanted is Wanted.ALL:
            made.prepared = prepared
        made.seconds["pack"] = time.perf_counter() - began
        return made

    def finish(self) -> None:
        """Writes what the last call lowered, if the cache is to have it."""
        job, self._later.job = getattr(self._later, "job", None), None
        if job is not None:
            job()

    def close(self) -> None:
        """Nothing can be done."""

    def _found(self, line: Line) -> Adapter | None:
        """In the cache, by the digest that it was registered with."""
        own = line[-1]
        if self._cache is None or not all(source.digest for source in line):
            return None
        return self._cache.find(own.digest, own.options)

    def _lowered(self, line: Line) -> tuple[Adapter, tuple[str, ...]]:
        adapter: Adapter | None = None
        digests = []
        for source in line:
            adapter = self._read(source.uri, source.options, adapter)
            digests.append(adapter.digest)
        assert adapter is not None, "an empty line"
        return adapter, tuple(digests)
