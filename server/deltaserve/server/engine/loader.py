"""Loader: the threads that read, check, lower and pack adapters."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import AdapterError
from deltaserve.adapters.options import LoadOptions
from deltaserve.kernels.native.openmp import compute_alone
from deltaserve.server.engine.registry import Registry
from deltaserve.server.engine.residency import Arrival, Residency
from deltaserve.server.engine.residents import Host
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
        self._loading = 0
        self._pool = ThreadPoolExecutor(
            loaders, thread_name_prefix="deltaserve-loader", initializer=compute_alone
        )

    @property
    def busy(self) -> bool:
        """No thread is free."""
        return self._loading >= self._loaders

    def start(self, residency: Residency) -> None:
        """Load it, or load it again. Under the registry's lock."""
        residency.loading = True
        self._loading += 1
        self._registry.notify(residency)
        self._pool.submit(self._load, residency)

    def digest(self, uri: str, options: LoadOptions, then: Callable[[str], None]) -> Future[None]:
        """Read what is at `uri` and go on with its digest, on a loader thread; the result is of
        both."""
        return self._pool.submit(lambda: then(self._content(uri, options).digest))

    def close(self) -> None:
        """Wait for the loads that have begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, residency: Residency) -> None:
        began = time.perf_counter()
        arrival = Arrival(residency, 0.0)
        try:
            adapter = self._content(residency.uri, residency.options)
            self._registry.check_digest(residency, adapter)
            arrival.prepared = self._host.prepare(adapter)
            arrival.adapter = adapter.without_content()
        except Exception as error:
            if not isinstance(error, AdapterError | RequestError):
                log.exception("loading adapter %r from %s failed", residency.name, residency.uri)
            arrival.error = error
        arrival.seconds = time.perf_counter() - began
        with self._registry.lock:
            self._loading -= 1
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
