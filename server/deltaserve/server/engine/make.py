"""Make: from an adapter's files to what is published, wherever that is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.options import LoadOptions
from deltaserve.server.engine.residency import Prepared
from deltaserve.server.engine.residents import Host

Read: TypeAlias = Callable[[str, LoadOptions, Adapter | None], Adapter]
"""uri, options, its parent's content -> Adapter."""

Line: TypeAlias = tuple[tuple[str, LoadOptions], ...]
"""uri and options of an adapter's parents, the nearest to the base first, then its own."""


class Wanted(Enum):
    DIGEST = 1
    CHECK = 2  # that it can be packed as well
    ALL = 3


@dataclass(slots=True)
class Made:
    """digests: of each of the line. adapter: without content, unless its digest alone was wanted.
    nbytes: as packed, 0 if it was not."""

    digests: tuple[str, ...]
    adapter: Adapter | None = None
    prepared: Prepared | None = None
    nbytes: int = 0


class Make(Protocol):
    """Called on loader threads, several at once."""

    def __call__(self, line: Line, wanted: Wanted) -> Made: ...

    def close(self) -> None:
        """Have what is under way fail, where that can be done."""
        ...


class MakeHere:
    """Read, check, lower and pack it on the thread that calls. Parents are read anew: they need
    not be in memory."""

    def __init__(self, read: Read, host: Host) -> None:
        self._read = read
        self._host = host

    def __call__(self, line: Line, wanted: Wanted) -> Made:
        adapter: Adapter | None = None
        digests = []
        for uri, options in line:
            adapter = self._read(uri, options, adapter)
            digests.append(adapter.digest)
        assert adapter is not None, "an empty line"
        made = Made(tuple(digests))
        if wanted is Wanted.DIGEST:
            return made
        prepared: Prepared = self._host.prepare(adapter)
        made.adapter, made.nbytes = adapter.without_content(), prepared.nbytes
        if wanted is Wanted.ALL:
            made.prepared = prepared
        return made

    def close(self) -> None:
        """Nothing can be done."""
