"""Joins: a load under a name that is registered already."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from deltaserve.adapters.options import LoadOptions
from deltaserve.server.engine.core import AdapterInfo, AdapterState
from deltaserve.server.engine.loader import Loader
from deltaserve.server.engine.registry import Registry
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.workers import Urgency
from deltaserve.server.errors import AdapterBusy, AdapterConflict, AdapterUnavailable, RequestError


class Joins:
    """reload: starts the load of what was evicted."""

    def __init__(
        self, registry: Registry, loader: Loader, reload: Callable[[Residency, Urgency], None]
    ) -> None:
        self._registry = registry
        self._lock = registry.lock
        self._loader = loader
        self._reload = reload

    def compare(
        self,
        known: Residency,
        uri: str,
        options: LoadOptions,
        pinned: bool,
        register_only: bool,
        done: Future[AdapterInfo],
    ) -> None:
        """Is what `uri` holds what `known` is?"""

        def join(digest: str) -> None:
            with self._lock:
                self._join(known, uri, digest, pinned, register_only, done)

        self._loader.digest(uri, options, join, done)

    def _join(
        self,
        known: Residency,
        uri: str,
        digest: str,
        pinned: bool,
        register_only: bool,
        done: Future[AdapterInfo],
    ) -> None:
        """The same content under the same name: its load is this one's too."""
        name = known.name
        if known.loading and not known.digest:  # the first load says what the name stands for
            first: Future[AdapterInfo] = self._registry.promise()
            known.waiting_for_check.append(first)

            def again(_: Future[AdapterInfo]) -> None:
                with self._lock:
                    if not self._registry.closed:  # which fails what was promised
                        try:
                            self._join(known, uri, digest, pinned, register_only, done)
                        except RequestError as error:
                            done.set_exception(error)

            first.add_done_callback(again)
            return
        if known.state is AdapterState.FAILED:
            raise AdapterUnavailable(f"adapter {name!r} could not be loaded: {known.error}")
        if known.unloading is not None:
            raise AdapterBusy(f"adapter {name!r} was unloaded meanwhile: load it again")
        known.digest = known.digest or digest
        if digest != known.digest:
            raise AdapterConflict(
                f"adapter {name!r} is registered with digest {known.digest[:16]}; "
                f"{uri} has digest {digest[:16]}: unload the name first, or choose another",
                field="name",
            )
        known.pinned = known.pinned or pinned
        if known.ready or (register_only and not known.loading):
            done.set_result(known.info())
            return
        known.waiting(register_only).append(done)
        if not known.loading:
            self._reload(known, Urgency.ASKED)
