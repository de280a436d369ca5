"""Residency: one registered adapter, in memory or not; Arrival: what its load made of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.kernels.primitives import Prefix
from deltaserve.server.engine.core import AdapterInfo, AdapterState, Tier
from deltaserve.server.engine.masks import Chosen
from deltaserve.server.engine.shares import Memory

if TYPE_CHECKING:
    from deltaserve.server.engine.text import Text


@dataclass(slots=True)
class View:
    """Some of a resident adapter's modules in a slot of their own, and how many requests use it."""

    slot: int
    users: int = 0


Futures: TypeAlias = list[Future[AdapterInfo]]

MAX_NOTES = 512
"""Characters of notes that are kept of an adapter that is not in memory."""


@dataclass(eq=False, slots=True)
class Residency:
    """One registered adapter. in_flight counts the requests that name it and are not done,
    running those of them that hold cache blocks: it cannot be evicted under those. patch: it is
    part of every request. structure, prefix, prepared, slot and views: while it is in memory.
    nbytes: what it takes there, known from its first load on. loading: a loader has it, or it
    waits for room. tier: where it is while it is in memory. kept: it is in the host tier.
    waiting_for_check: who asked for no more than that it be registered.

    Thousands may be registered, so what is kept of one that is not in memory is small, and texts
    that many have in common are one object. uses: requests since it came into memory. value: as in
    `memory.Ledger`. shared: memory that others hold too, and its bytes, as far as that is known.
    """

    name: str
    uri: str
    options: LoadOptions = DEFAULT
    pinned: bool = False
    patch: bool = False
    digest: str = ""
    state: AdapterState = AdapterState.LOADING
    structure: Adapter | None = None  # without content
    prefix: Prefix | None = None
    prepared: Any = None
    shared: dict[Hashable, int] = field(default_factory=dict)
    slot: int = 0
    views: dict[Chosen, View] = field(default_factory=dict)
    nbytes: int = 0
    uses: int = 0
    value: float = 0.0
    in_flight: int = 0
    running: int = 0
    loads: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0
    load_seconds: float = 0.0
    error: str = ""
    format: str = ""
    primitives: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source_bytes: int = 0
    loading: bool = False
    own_text: Text | None = None  # the tokenizer that it brings
    text_read: bool = False  # what it brings is known
    cached: bool = False  # lowered, on disk, as far as is known
    tier: Tier = Tier.HOST
    kept: bool = False
    crowded_since: float = 0.0  # `time.monotonic()`; 0 while there is room for it
    waiting_for_load: Futures = field(default_factory=list)
    waiting_for_check: Futures = field(default_factory=list)
    unloading: Future[int] | None = None

    @property
    def ready(self) -> bool:
        return self.slot > 0

    def waiting(self, register_only: bool) -> Futures:
        """Of those who want it checked alone, or loaded."""
        return self.waiting_for_check if register_only else self.waiting_for_load

    def describe(self, adapter: Adapter) -> None:
        """Take over what is known of it from now on, in memory or not."""
        self.digest = adapter.digest
        self.format = sys.intern(adapter.format)
        self.primitives = _shared(adapter.primitives)
        self.notes = adapter.notes
        self.source_bytes = adapter.source_bytes

    def shrink(self) -> None:
        """It is not in memory any more: keep little."""
        self.notes = () if sum(map(len, self.notes)) > MAX_NOTES else _shared(self.notes)

    @property
    def crowded(self) -> bool:
        """Running requests leave it no room."""
        return self.crowded_since > 0

    @crowded.setter
    def crowded(self, crowded: bool) -> None:
        self.crowded_since = (self.crowded_since or time.monotonic()) if crowded else 0.0

    def info(self) -> AdapterInfo:
        return AdapterInfo(
            name=self.name,
            digest=self.digest,
            uri=self.uri,
            state=self.state,
            tier=self._tier(),
            format=self.format,
            primitives=self.primitives,
            resident_bytes=self.nbytes if self.ready else 0,
            source_bytes=self.source_bytes,
            pinned=self.pinned,
            in_flight=self.in_flight,
            loads=self.loads,
            last_used=self.last_used,
            loaded_at=self.loaded_at,
            load_seconds=self.load_seconds,
            error=self.error,
            notes=self.notes,
            parent=self.options.parent,
            patch=self.patch,
            own_tokenizer=self.own_text is not None,
        )

    def _tier(self) -> Tier:
        if self.ready:
            return self.tier
        return Tier.HOST if self.kept else Tier.CACHE if self.cached else Tier.DISK


_texts: dict[tuple[str, ...], tuple[str, ...]] = {}


def _shared(texts: tuple[str, ...]) -> tuple[str, ...]:
    """An equal tuple that was given before, if it is among the first few hundred."""
    if len(_texts) >= 256:
        return _texts.get(texts, texts)
    return _texts.setdefault(texts, texts)


class Prepared(Protocol):
    """An adapter packed for serving."""

    @property
    def nbytes(self) -> int: ...
    @property
    def memory(self) -> Memory:
        """Every piece of memory that it keeps, by what other adapters' is known to be the same."""

    @property
    def prefix(self) -> Prefix | None: ...
    def tensors(self) -> Iterable[Tensor]:
        """All that it keeps."""


@dataclass(slots=True)
class Arrival:
    """What a loader thread made of it: the adapter without content and packed, or an error.
    nbytes: as packed; nothing packed is there if it was checked only. seconds: how long it took,
    stages: of that, and before it. at: when it was made. hit, cached: as in `Made`."""

    residency: Residency
    seconds: float
    adapter: Adapter | None = None
    prepared: Prepared | None = None
    nbytes: int = 0
    hit: bool | None = None
    cached: bool = False
    at: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
