"""Pins: what the arms' adapters are, when a route is put and later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from deltaserve.server.called import parse
from deltaserve.server.engine.core import AdapterInfo, AdapterState
from deltaserve.server.errors import AdapterBusy, AdapterUnavailable, AdapterUnknown
from deltaserve.server.routes.check import refuse
from deltaserve.server.routes.route import Route


class Adapters(Protocol):
    """The part of `AdapterCache` that is needed here."""

    def get(self, name: str) -> AdapterInfo: ...


class Pins:
    """is_route: whether a name is a route's."""

    def __init__(self, adapters: Adapters, is_route: Callable[[str], bool]) -> None:
        self._adapters = adapters
        self._is_route = is_route

    def exists(self, name: str) -> bool:
        """Whether an adapter has the name."""
        try:
            self._adapters.get(name)
        except AdapterUnknown:
            return False
        return True

    def pin(self, called: str, field: str) -> tuple[str, str]:
        """As `check.Pin`. AdapterUnknown, AdapterUnavailable or AdapterBusy."""
        name, wanted = parse(called, field)
        if self._is_route(name):
            refuse(field, repr(name), "an adapter or the base: it is a route")
        try:
            info = self._adapters.get(name)
        except AdapterUnknown as error:
            raise AdapterUnknown(f"{field}: {error}", field=field) from None
        if info.state is AdapterState.FAILED:
            why = f"{field}: adapter {name!r} could not be loaded: {info.error}"
            raise AdapterUnavailable(why, field=field)
        if not info.digest or info.state is AdapterState.UNLOADING:
            doing = "loaded" if not info.digest else "unloaded"
            raise AdapterBusy(
                f"{field}: adapter {name!r} is being {doing}; try again when that is done",
                field=field,
            )
        if not info.digest.startswith(wanted):
            raise AdapterUnknown(
                f"{field}: adapter {name!r} has digest {info.digest[:16]}, not {wanted[:16]!r}",
                field=field,
            )
        return f"{name}@{info.digest}", info.digest

    def broken(self, route: Route) -> dict[str, str]:
        """Why arms refuse requests: their adapters are not there, or not as they were."""
        found: dict[str, str] = {}
        for arm in route.arms.values():
            for called in arm.called:
                try:
                    self.pin(called, "model")
                except (AdapterUnknown, AdapterUnavailable, AdapterBusy) as error:
                    found.setdefault(arm.name, str(error))
        return found
