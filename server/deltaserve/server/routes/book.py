"""RouteBook: the routes that there are, and every change of them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from deltaserve.server.engine.core import AdapterInfo, AdapterState
from deltaserve.server.errors import (
    AdapterBusy,
    AdapterUnavailable,
    AdapterUnknown,
    Changed,
    InvalidRequest,
    NameTaken,
    RouteUnavailable,
    RouteUnknown,
    StateUnavailable,
)
from deltaserve.server.experiments.errors import InvalidExperiment
from deltaserve.server.experiments.layers import check_slices
from deltaserve.server.routes.check import check, refuse
from deltaserve.server.routes.route import Route, Standing, State
from deltaserve.server.state.records import Entry
from deltaserve.v1 import route_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.routes.shelf import Shelf

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ROUTES = 256
MAX_REASON = 1024


class Adapters(Protocol):
    """The part of `AdapterCache` that is needed here."""

    def get(self, name: str) -> AdapterInfo: ...


class RouteBook:
    """Belongs to one event loop. What is put or deleted is durable before it holds; what keeps
    harm away (a rollback, a hold) holds at once and is then written. shelf: None keeps nothing.
    A client that goes away does not undo what it began. clock: `time.time`."""

    def __init__(
        self,
        adapters: Adapters,
        base: str,
        shelf: Shelf | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._adapters = adapters
        self._base = base
        self._shelf = shelf
        self._clock = clock
        self._standings: dict[str, Standing] = {}
        self._failed: dict[str, str] = {}
        self._coming = ""
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    async def restore(self) -> None:
        """Those of the shelf. StateUnavailable if it cannot be read."""
        if self._shelf is None:
            return
        found, self._failed = await self._shelf.all(self._base)
        for standing in found:
            try:
                self._check_free(standing.route)
            except (NameTaken, InvalidRequest) as error:
                self._failed[standing.route.name] = str(error)
                continue
            self._standings[standing.route.name] = standing
            for arm, why in self.broken(standing.route).items():
                log.warning("route %r refuses arm %r: %s", standing.route.name, arm, why)
        for name, why in self._failed.items():
            log.warning("route %r of --state is not served: %s", name, why)
            await self._shelf.note(Entry("server", "Restore", name, "QUARANTINED", detail=why))
        log.info("brought back %d routes", len(self._standings))

    # Reading:

    def find(self, name: str) -> Standing | None:
        """The route that requests call so; None without one. RouteUnavailable for one that could
        not be brought back."""
        if name in self._failed and not self._is_adapter(name):
            raise RouteUnavailable(
                f"route {name!r} could not be brought back: {self._failed[name]}; put it anew or "
                "delete it",
                field="model",
            )
        return self._standings.get(name)

    def get(self, name: str) -> Standing:
        """RouteUnknown without one; RouteUnavailable as `find`."""
        found = self.find(name)
        if found is None:
            names = ", ".join(sorted(self._standings)[:8]) or "none"
            raise RouteUnknown(f"no route named {name!r} (routes: {names})", field="name")
        return found

    def all(self) -> list[Standing]:
        """By name."""
        return [standing for _, standing in sorted(self._standings.items())]

    @property
    def failed(self) -> Mapping[str, str]:
        """Why those that could not be brought back were not, by name."""
        return self._failed

    def check_adapter_name(self, name: str) -> None:
        """NameTaken if a route has it."""
        if name in self._standings or name == self._coming:
            raise NameTaken(f"name: a route is called {name!r}; choose another", field="name")

    def check_unused(self, adapter: str) -> None:
        """AdapterBusy while an arm that may be asked for has it."""
        for standing in self.all():
            for arm in standing.route.arms.values():
                if standing.state is State.ROLLED_BACK and arm.name != standing.route.control:
                    continue
                called = {x.partition("@")[0] for x in (arm.model, *(a.name for a in arm.adapters))}
                if adapter in called:
                    raise AdapterBusy(
                        f"adapter {adapter!r} is in arm {arm.name!r} of route "
                        f"{standing.route.name!r}: change or delete that first",
                        field="name",
                    )

    def broken(self, route: Route) -> dict[str, str]:
        """Why arms refuse requests: their adapters are not there, or not as they were."""
        found: dict[str, str] = {}
        for arm in route.arms.values():
            for called in (arm.model, *(a.name for a in arm.adapters)):
                try:
                    if called:
                        self._pin(called, "model")
                except (AdapterUnknown, AdapterUnavailable, AdapterBusy) as error:
                    found.setdefault(arm.name, str(error))
        return found

    # Changing:

    async def put(self, who: str, given: pb.Route) -> Standing:
        """Make it or change it."""
        entry = Entry(who, "PutRoute", given.name)
        return await self._whole(entry, self._put(who, given, entry))

    async def delete(self, who: str, name: str) -> None:
        """Take it away."""
        entry = Entry(who, "DeleteRoute", name)

        async def delete() -> None:
            async with self._lock:
                if name not in self._failed:
                    self.get(name)
                if self._shelf is not None:
                    await self._shelf.remove(name, entry)
                self._standings.pop(name, None)
                self._failed.pop(name, None)

        await self._whole(entry, delete())

    async def roll_back(
        self, who: str, name: str, reason: str, epoch: int | None = None
    ) -> Standing:
        """All requests to its control, from now on. epoch: only if it is still that."""
        entry = Entry(who, "RollBackRoute", name, detail=reason)
        reason = reason[:MAX_REASON]

        def change(standing: Standing) -> Standing:
            if standing.state is State.ROLLED_BACK or epoch not in (None, standing.epoch):
                return standing
            return replace(standing, state=State.ROLLED_BACK, reason=reason)

        return await self._whole(entry, self._at_once(name, change, entry))

    async def hold(self, who: str, name: str, reason: str, epoch: int) -> Standing:
        """The weights of now, until it is put anew or `resume`d. epoch: as of `roll_back`."""
        entry = Entry(who, "HoldRoute", name, detail=reason)

        def change(standing: Standing) -> Standing:
            if not (standing.state is State.ACTIVE or standing.waits) or epoch != standing.epoch:
                return standing
            weights = standing.shares(self._clock())
            began = _resumed(standing, self._clock()).began
            return replace(
                standing, state=State.HELD, reason=reason[:MAX_REASON], weights=weights, began=began
            )

        return await self._whole(entry, self._at_once(name, change, entry))

    async def resume(self, who: str, name: str, epoch: int) -> Standing:
        """Its ramp goes on where it stood still. epoch: as of `roll_back`."""
        entry = Entry(who, "ResumeRoute", name)

        def change(standing: Standing) -> Standing:
            return (
                standing if standing.state is not State.HELD else _resumed(standing, self._clock())
            )

        return await self._whole(entry, self._at_once(name, change, entry))

    async def reweight(self, who: str, name: str, epoch: int, weights: Mapping[str, float]) -> None:
        """A bandit's new weights, if the route is what they were drawn for."""
        shown = ", ".join(f"{arm} {weight:.4f}" for arm, weight in weights.items())
        entry = Entry(who, "ReweightRoute", name, detail=shown)

        async def reweight() -> None:
            async with self._lock:
                known = self._standings.get(name)
                if known is None or known.epoch != epoch or known.state is not State.ACTIVE:
                    return
                now = self._clock()
                changed = replace(known, weights=dict(weights), bandit_at=now, changed=now)
                if self._shelf is not None:
                    await self._shelf.put(changed, entry)
                if self._standings.get(name) is known:  # it may have been rolled back
                    self._standings[name] = changed
                log.info("route=%s weights: %s", name, shown)

        await self._whole(entry, reweight())

    async def _put(self, who: str, given: pb.Route, entry: Entry) -> Standing:
        async with self._lock:
            route = check(given, self._base, self._pin)
            before = self._standings.get(route.name)
            if given.etag and (before is None or given.etag != before.etag):
                now = f"is {before.etag!r} now" if before else "does not exist"
                raise Changed(
                    f"route.etag: {given.etag!r} is not that of {route.name!r}, which {now}; read "
                    "it again",
                    field="route.etag",
                )
            standing = self._made(route, before, who)
            with self._coming_as(route.name):
                self._check_free(route)
                if self._shelf is not None:
                    await self._shelf.put(standing, entry)
                if self._standings.get(route.name) is not before:  # it was rolled back meanwhile
                    raise Changed(
                        f"route {route.name!r} was rolled back while it was changed; put it again",
                        field="route.name",
                    )
                self._standings[route.name] = standing
                self._failed.pop(route.name, None)
        log.info("route=%s put by %s, epoch %d", route.name, who, standing.epoch)
        return standing

    def _made(self, route: Route, before: Standing | None, who: str) -> Standing:
        now = self._clock()
        made = Standing(route, int(now * 1000), _etag(), now, now, who)
        if before is None:
            return made
        ended = before.state is not State.ACTIVE and not before.waits
        if ended or route.counted != before.route.counted:
            return replace(made, epoch=max(made.epoch, before.epoch + 1))
        made = replace(made, epoch=before.epoch)
        if route.given.ramp == before.route.given.ramp:
            made = replace(made, began=_resumed(before, now).began)
        if route.bandit is not None and before.route.bandit is not None:
            made = replace(made, weights=before.weights, bandit_at=before.bandit_at)
        return made

    async def _at_once(
        self, name: str, change: Callable[[Standing], Standing], entry: Entry
    ) -> Standing:
        """Change it, then write it. What was being written at that moment is changed as well."""
        known = self.get(name)
        if (now := change(known)) is not known:
            self._standings[name] = self._stamped(now)
        async with self._lock:
            changed = self.get(name)
            if (now := change(changed)) is not changed:
                changed = self._standings[name] = self._stamped(now)
            log.info("route=%s %s: %s", name, changed.state.value, changed.reason)
            if self._shelf is not None:
                try:
                    await self._shelf.put(changed, entry)
                except StateUnavailable as error:
                    raise StateUnavailable(
                        f"route {name!r} is {changed.state.value}, but that is not kept: it holds "
                        f"until the server ends. {error}. Ask again when that is mended"
                    ) from error
            return changed

    def _stamped(self, standing: Standing) -> Standing:
        return replace(standing, etag=_etag(), changed=self._clock())

    def _pin(self, called: str, field: str) -> tuple[str, str]:
        """As `check.Pin`. AdapterUnknown, AdapterUnavailable or AdapterBusy."""
        name, _, wanted = called.partition("@")
        if name in self._standings:
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

    def _check_free(self, route: Route) -> None:
        """NameTaken or InvalidRequest if it cannot be beside what there is."""
        name = route.name
        if self._is_adapter(name):
            raise NameTaken(
                f"route.name: an adapter is called {name!r}; choose another", field="route.name"
            )
        others = [s.route for n, s in self._standings.items() if n != name]
        if len(others) >= MAX_ROUTES:
            refuse("route.name", f"one more than {MAX_ROUTES} routes", "that of a route there is")
        if route.layer is not None:
            layer, part = route.layer
            slices = [o.layer[1] for o in others if o.layer is not None and o.layer[0] == layer]
            try:
                check_slices([*slices, part])
            except InvalidExperiment as error:
                text = f"route.layer: in layer {layer!r}, {error}"
                raise InvalidRequest(text, field="route.layer") from None

    def _is_adapter(self, name: str) -> bool:
        try:
            self._adapters.get(name)
        except AdapterUnknown:
            return False
        return True

    @contextmanager
    def _coming_as(self, name: str) -> Iterator[None]:
        """Nobody else takes the name meanwhile."""
        self._coming = name
        try:
            yield
        finally:
            self._coming = ""

    async def _whole(self, entry: Entry, work: Coroutine[Any, Any, T]) -> T:
        """Also when the client goes away. What is refused is noted."""
        task = asyncio.create_task(self._noted(entry, work))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _noted(self, entry: Entry, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except Exception as error:
            if self._shelf is not None and not isinstance(error, StateUnavailable):
                refused = replace(entry, outcome=type(error).__name__, detail=str(error))
                try:
                    await self._shelf.note(refused)
                except StateUnavailable as unavailable:
                    log.warning("--state: %s was refused: %s", entry.verb, unavailable)
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # the client may have gone; it is noted already


def _resumed(standing: Standing, now: float) -> Standing:
    """Active, its ramp's clock moved on by the time that it stood still."""
    if standing.state is not State.HELD:
        return standing
    began = standing.began + now - standing.changed
    weights = standing.weights if standing.route.bandit is not None else {}
    return replace(standing, state=State.ACTIVE, reason="", began=began, weights=weights)


def _etag() -> str:
    return secrets.token_hex(8)
