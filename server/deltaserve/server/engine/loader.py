"""Loader: the threads that read, check, lower and pack adapters."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from deltaserve.adapters.errors import AdapterError
from deltaserve.adapters.options import LoadOptions
from deltaserve.kernels.native.openmp import compute_alone
from deltaserve.server.engine.core import AdapterInfo
from deltaserve.server.engine.make import Made, Make, Source, Wanted
from deltaserve.server.engine.registry import Registry
from deltaserve.server.engine.residency import Arrival, Residency
from deltaserve.server.engine.workers import Urgency, Workers
from deltaserve.server.errors import RequestError

if TYPE_CHECKING:
    from deltaserve.server.engine.own_text import OwnTexts
    from deltaserve.server.engine.text import Text

log = logging.getLogger(__name__)


class Loader:
    """make: called on its threads. What it made is in `arrived` until the engine thread takes it.
    on_arrival: called from a loader thread when something is there. loaders: threads. texts: reads
    the tokenizers that adapters bring; None leaves them unread."""

    def __init__(
        self, registry: Registry, make: Make, on_arrival: Callable[[], None], loaders: int
    ) -> None:
        self.arrived: deque[Arrival] = deque()
        self.texts: OwnTexts | None = None
        self._registry = registry
        self._make = make
        self._on_arrival = on_arrival
        self.loaders = loaders
        self._wanted = 0
        self._workers = Workers(loaders, "deltaserve-loader", compute_alone)

    @property
    def busy(self) -> bool:
        """As many loads as there are threads are under way for waiting requests."""
        return self._wanted >= self.loaders

    def start(self, residency: Residency, urgency: Urgency) -> None:
        """Load it, or load it again; check it only if that is `Urgency.WHENEVER`. Under the
        registry's lock."""
        residency.loading = True
        self._wanted += urgency is Urgency.WANTED
        self._registry.notify(residency)
        self._workers.submit(urgency, partial(self._load, residency, urgency, time.perf_counter()))

    def digest(
        self, uri: str, options: LoadOptions, then: Callable[[str], None], done: Future[AdapterInfo]
    ) -> None:
        """Read what is at `uri` and go on with its digest, on a loader thread; what either raises
        is `done`'s."""

        def read() -> None:
            try:
                then(self._made(uri, options, Wanted.DIGEST).digests[-1])
            except Exception as error:
                done.set_exception(error)
            self._on_arrival()
            self._make.finish()

        self._workers.submit(Urgency.ASKED, read)

    def text(self, residency: Residency, done: Future[Text | None]) -> None:
        """What it brings, which a load that is under way may not have read yet."""

        def read() -> None:
            try:
                done.set_result(self._read_text(residency))
            except Exception as error:
                done.set_exception(error)

        self._workers.submit(Urgency.WANTED, read)

    def close(self) -> None:
        """Wait for the loads that have begun, or have them fail; the others are not done."""
        self._make.close()
        self._workers.close()
        if self.texts is not None:
            self.texts.close()

    def _load(self, residency: Residency, urgency: Urgency, queued: float) -> None:
        began = time.perf_counter()
        arrival = Arrival(residency, 0.0)
        try:
            wanted = Wanted.CHECK if urgency is Urgency.WHENEVER else Wanted.ALL
            made = self._made(residency.uri, residency.options, wanted, residency.digest)
            self._registry.check_digest(residency, made.digests[-1])
            self._read_text(residency)
            arrival.adapter, arrival.prepared = made.adapter, made.prepared
            arrival.nbytes, arrival.hit, arrival.cached = made.nbytes, made.hit, made.cached
            arrival.stages = {**made.seconds, "queue": began - queued}
        except Exception as error:
            if not isinstance(error, AdapterError | RequestError):
                log.exception("loading adapter %r from %s failed", residency.name, residency.uri)
            arrival.error = error
        arrival.at = time.perf_counter()
        arrival.seconds = arrival.at - began
        with self._registry.lock:
            self._wanted -= urgency is Urgency.WANTED
            self.arrived.append(arrival)
        self._on_arrival()
        self._make.finish()

    def _read_text(self, residency: Residency) -> Text | None:
        """The tokenizer that it brings, or the one that its parent does. Raises InvalidAdapter."""
        if self.texts is not None and not residency.text_read:
            own = self.texts.read(residency.uri)
            if own is None and (parent := residency.options.parent):
                with self._registry.lock:
                    found = self._registry.find(parent, "options.parent")
                own = self._read_text(found)
            residency.own_text, residency.text_read = own, True
        return residency.own_text

    def _made(self, uri: str, options: LoadOptions, wanted: Wanted, digest: str = "") -> Made:
        """digest: what it was registered with, if it was. AdapterConflict if a parent is not what
        it was when that was registered."""
        line, parents = [Source(uri, options, digest)], list[Residency]()
        with self._registry.lock:
            while line[0].options.parent:
                parent = self._registry.find(line[0].options.parent, "options.parent")
                line.insert(0, Source(parent.uri, parent.options, parent.digest))
                parents.insert(0, parent)
        made = self._make(tuple(line), wanted)
        for parent, digest in zip(parents, made.digests, strict=False):
            self._registry.check_digest(parent, digest)
        return made
