"""Registry: the names of adapters, what each stands for, and who is told of its changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from deltaserve.adapters.options import LoadOptions
from deltaserve.server.called import parse
from deltaserve.server.engine.core import AdapterInfo, AdapterState
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.watchers import Watchers
from deltaserve.server.errors import (
    AdapterBusy,
    AdapterConflict,
    AdapterUnavailable,
    AdapterUnknown,
    InvalidRequest,
    ShuttingDown,
)

MAX_LINE = 8
"""Adapters from one to the base, through its parents: each is read for a load."""

T = TypeVar("T")
Infos: TypeAlias = list[AdapterInfo]


class Registry:
    """Any thread; what changes more than one thing at a time holds `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.closed = False
        self._by_name: dict[str, Residency] = {}
        self._watchers = Watchers()
        self._promised: set[Future[Any]] = set()

    def get(self, name: str) -> Residency | None:
        return self._by_name.get(name)

    def add(self, residency: Residency) -> None:
        """In place of the one of that name, if there is one."""
        self._by_name[residency.name] = residency

    def forget(self, name: str) -> None:
        self._by_name.pop(name, None)

    def all(self) -> list[Residency]:
        """By name."""
        with self.lock:
            found = list(self._by_name.values())
        return sorted(found, key=lambda r: r.name)

    def children(self, name: str) -> list[str]:
        """Names of those whose files are relative to it, sorted."""
        with self.lock:
            return sorted(r.name for r in self._by_name.values() if r.options.parent == name)

    def find(self, name: str, field: str = "name") -> Residency:
        """AdapterUnknown if there is none of that name."""
        residency = self._by_name.get(name)
        if residency is None:
            raise AdapterUnknown(f"no adapter named {name!r} is registered", field=field)
        return residency

    def resolve(self, called: str, field: str = "model") -> Residency:
        """One that requests may use. called: a name, or ``name@digest-prefix``."""
        name, digest = parse(called, field)
        residency = self.find(name, field)
        if residency.state is AdapterState.UNLOADING:
            raise AdapterUnknown(f"adapter {name!r} is being unloaded", field=field)
        if residency.state is AdapterState.FAILED:
            raise AdapterUnavailable(
                f"adapter {name!r} could not be loaded: {residency.error}", field=field
            )
        if digest and not (residency.digest and residency.digest.startswith(digest)):
            raise AdapterUnknown(
                f"adapter {name!r} has digest {residency.digest[:16] or '(loading)'}, "
                f"not {digest!r}",
                field=field,
            )
        return residency

    def parented(self, name: str, options: LoadOptions) -> LoadOptions:
        """The options with the parent's plain name; InvalidRequest if its line of parents is too
        long or comes back to `name`, as it could after a load that failed."""
        line, at = [name], options
        while at.parent:
            parent = self.resolve(at.parent, "options.parent")
            if at is options:
                options = replace(options, parent=parent.name)
            line.append(parent.name)
            at = parent.options
            if parent.name == name or len(line) > MAX_LINE:
                raise InvalidRequest(
                    f"options.parent: {' < '.join(line)} is not possible; a line of parents must "
                    f"end at the base after at most {MAX_LINE - 1}",
                    field="options.parent",
                )
        return options

    def check_digest(self, residency: Residency, digest: str) -> None:
        """AdapterConflict if it is not what it was when it was registered."""
        with self.lock:
            registered = residency.digest = residency.digest or digest
        if digest != registered:
            raise AdapterConflict(
                f"{residency.uri} has changed since {residency.name!r} was registered: digest "
                f"{digest[:16]}, registered {registered[:16]}",
                field="uri",
            )

    def promise(self) -> Future[T]:
        """A future that `close` fails if nothing else has come of it by then."""
        future: Future[T] = Future()
        self._promised.add(future)
        future.add_done_callback(self._promised.discard)
        return future

    def close(self) -> None:
        """Fail what was promised and has not come."""
        for future in list(self._promised):
            future.set_exception(ShuttingDown("the server is shutting down"))

    def subscribe(self, callback: Callable[[AdapterInfo], None]) -> Callable[[], None]:
        """Call back at every change of state, from whatever thread makes it; the result ends it."""
        return self._watchers.subscribe(callback)

    def change(self, residency: Residency, state: AdapterState) -> None:
        residency.state = state
        self.notify(residency)

    def notify(self, residency: Residency) -> None:
        self._watchers.tell(residency.info())


def check_free(residency: Residency) -> None:
    """AdapterBusy for a patch."""
    if residency.patch:
        raise AdapterBusy(
            f"adapter {residency.name!r} is part of every request to this server: it stays until "
            "the server ends",
            field="name",
        )
