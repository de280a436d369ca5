"""Loader: the threads that read, check, lower and pack adapters."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import AdapterError
from deltaserve.adapters.options import LoadOptions
from deltaserve.kernels.native.openmp import compute_alone
from deltaserve.server.engine.core import AdapterInfo
from deltaserve.server.engine.registry import Registry
from deltaserve.server.engine.residency import Arrival, Residency
from deltaserve.server.engine.residents import Host
from deltaserve.server.engine.workers import Urgency, Workers
from deltaserve.server.errors import RequestError

log = logging.getLogger(__name__)

Read: TypeAlias = Callable[[str, LoadOptions, Adapter | None], Adapter]
"""uri, options, its parent's content -> Adapter."""


class Loader:
    """What it made is in `arrived` until the engine thread takes it. on_arrival: called from a
    loader thread when something is there. loaders: threads."""

    def __init__(
        self,
        registry: Registry,
        host: Host,
        read: Read,
        on_arrival: Callable[[], None],
        loaders: int,
    ) -> None:
        self.arrived: deque[Arrival] = deque()
        self._registry = registry
        self._host = host
        self._read = read
        self._on_arrival = on_arrival
        self._loaders = loaders
        self._wanted = 0
        self._workers = Workers(loaders, "deltaserve-loader", compute_alone)

    @property
    def busy(self) -> bool:
        """As many loads as there are threads are under way for waiting requests."""
        return self._wanted >= self._loaders

    def start(self, residency: Residency, urgency: Urgency) -> None:
        """Load it, or load it again; check it only if that is `Urgency.WHENEVER`. Under the
        registry's lock."""
        residency.loading = True
        self._wanted += urgency is Urgency.WANTED
        self._registry.notify(residency)
        self._workers.submit(urgency, lambda: self._load(residency, urgency))

    def digest(
        self, uri: str, options: LoadOptions, then: Callable[[str], None], done: Future[AdapterInfo]
    ) -> None:
        """Read what is at `uri` and go on with its digest, on a loader thread; what either raises
        is `done`'s."""

        def read() -> None:
            try:
                then(self._content(uri, options).digest)
            except Exception as error:
                done.set_exception(error)
            self._on_arrival()

        self._workers.submit(Urgency.ASKED, read)

    def close(self) -> None:
        """Wait for the loads that have begun; the others are not done."""
        self._workers.close()

    def _load(self, residency: Residency, urgency: Urgency) -> None:
        began = time.perf_counter()
        arrival = Arrival(residency, 0.0)
        try:
            adapter = self._content(residency.uri, residency.options)
            self._registry.check_digest(residency, adapter)
            prepared = self._host.prepare(adapter)
            arrival.nbytes = prepared.nbytes
            if urgency is not Urgency.WHENEVER:
                arrival.prepared = prepared
            arrival.adapter = adapter.without_content()
        except Exception as error:
            if not isinstance(error, AdapterError | RequestError):
                log.exception("loading adapter %r from %s failed", residency.name, residency.uri)
            arrival.error = error
        arrival.seconds = time.perf_counter() - began
        with self._registry.lock:
            self._wanted -= urgency is Urgency.WANTED
            self.arrived.append(arrival)
        self._on_arrival()

    def _content(self, uri: str, options: LoadOptions) -> Adapter:
        """What is at `uri`, on top of its parents, which are read anew: they need not be in
        memory."""
        parent: Adapter | None = None
        if options.parent:
            with self._registry.lock:
                residency = self._registry.find(options.parent, "options.parent")
            parent = self._content(residency.uri, residency.options)
            self._registry.check_digest(residency, parent)
        return self._read(uri, options, parent)
