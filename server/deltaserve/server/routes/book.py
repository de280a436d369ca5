"""RouteBook: the routes that there are, and every change of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from deltaserve.server.errors import (
    AdapterBusy,
    Changed,
    InvalidRequest,
    NameTaken,
    RouteUnavailable,
    StateUnavailable,
)
from deltaserve.server.identity.caller import Caller
from deltaserve.server.routes.check import check, check_layer, refuse
from deltaserve.server.routes.pending import Pending
from deltaserve.server.routes.pins import Adapters, Pins
from deltaserve.server.routes.route import Lost, Route, Standing, State
from deltaserve.server.routes.seen import check_owned, sees, unknown
from deltaserve.server.routes.standing import made, resumed, stamped
from deltaserve.server.routes.whole import Whole
from deltaserve.server.state.records import Entry
from deltaserve.v1 import route_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.routes.shelf import Shelf

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ROUTES = 256
MAX_REASON = 1024


SERVER = Caller("server")
"""What the server does of itself."""


class RouteBook:
    """Belongs to one event loop. What is put or deleted is durable before it holds; what keeps
    harm away (a rollback, a hold) holds at once and is then written. shelf: None keeps nothing.
    A client that goes away does not undo what it began. clock: `time.time`. reason:
    as of `Whole`."""

    def __init__(
        self,
        adapters: Adapters,
        base: tuple[str, ...],
        shelf: Shelf | None = None,
        clock: Callable[[], float] = time.time,
        reason: Callable[[Exception], str] = repr,
    ) -> None:
        self._base = base
        self._shelf = shelf
        self._pending = Pending(shelf)
        self._clock = clock
        self._standings: dict[str, Standing] = {}
        self._failed: dict[str, Lost] = {}
        self._pins = Pins(adapters, self._standings.__contains__)
        self._coming = ""
        self._lock = asyncio.Lock()
        self._whole = Whole(shelf, reason)

    async def restore(self) -> None:
        """Those of the shelf. StateUnavailable if it cannot be read."""
        if self._shelf is None:
            return
        found, self._failed = await self._shelf.all(self._base)
        for standing in found:
            try:
                self._check_free(standing.route, standing.tenant)
            except (NameTaken, InvalidRequest) as error:
                self._failed[standing.route.name] = Lost(standing.tenant, str(error))
                continue
            self._standings[standing.route.name] = standing
            for arm, why in self._pins.broken(standing.route).items():
                log.warning("route %r refuses arm %r: %s", standing.route.name, arm, why)
        for name, lost in self._failed.items():
            why = lost.reason
            log.warning("route %r of --state is not served: %s", name, why)
            await self._shelf.note(Entry(SERVER.name, "Restore", name, "QUARANTINED", detail=why))
        log.info("brought back %d routes", len(self._standings))

    # Reading:

    def find(self, name: str, caller: Caller = SERVER, field: str = "model") -> Standing | None:
        """The route that the caller's requests call so; None without one that it may see.
        RouteUnavailable for one that could not be brought back."""
        lost = self._failed.get(name)
        if lost is not None and sees(caller, lost) and not self._pins.exists(name):
            raise RouteUnavailable(
                f"route {name!r} could not be brought back: {lost.reason}; put it anew or "
                "delete it",
                field=field,
            )
        found = self._standings.get(name)
        return found if found is not None and sees(caller, found) else None

    def get(self, name: str, caller: Caller = SERVER, field: str = "name") -> Standing:
        """RouteUnknown without one; RouteUnavailable as `find`."""
        found = self.find(name, caller, field)
        if found is None:
            raise unknown(name, field)
        return found

    def known(self, name: str, caller: Caller) -> bool:
        """Whether the caller may see one of that name, brought back or not."""
        known = self._standings.get(name) or self._failed.get(name)
        return known is not None and sees(caller, known)

    def all(self, caller: Caller = SERVER) -> list[Standing]:
        """Those that the caller may see, by name."""
        return [s for _, s in sorted(self._standings.items()) if sees(caller, s)]

    def failed(self, caller: Caller) -> dict[str, str]:
        """Why those that could not be brought back were not, by name; of those it may see."""
        return {name: lost.reason for name, lost in self._failed.items() if sees(caller, lost)}

    def check_adapter_name(self, name: str) -> None:
        """NameTaken if a route has it."""
        if name in self._standings or name == self._coming:
            raise NameTaken(f"name: {name!r} is taken by a route; choose another", field="name")

    def check_unused(self, caller: Caller, adapter: str) -> None:
        """AdapterBusy while an arm that may be asked for has it, of a route that the caller sees:
        others' do not keep it from its owner."""
        for standing in self.all(caller):
            for arm in standing.route.arms.values():
                if standing.state is State.ROLLED_BACK and arm.name != standing.route.control:
                    continue
                if adapter in (called.partition("@")[0] for called in arm.called):
                    raise AdapterBusy(
                        f"adapter {adapter!r} is in arm {arm.name!r} of route "
                        f"{standing.route.name!r}: change or delete that first",
                        field="name",
                    )

    # Changing:

    async def put(self, caller: Caller, given: pb.Route) -> Standing:
        """Make it or change it."""
        entry = Entry(caller.name, "PutRoute", given.name)
        return await self._whole.run(entry, self._put(caller, given, entry))

    async def delete(self, caller: Caller, name: str) -> None:
        """Take it away."""
        entry = Entry(caller.name, "DeleteRoute", name)

        async def delete() -> None:
            async with self._lock:
                known = self._standings.get(name) or self._failed.get(name)
                check_owned(caller, name, known)
                await self._pending.remove(name, entry)
                self._standings.pop(name, None)
                self._failed.pop(name, None)

        await self._whole.run(entry, delete())

    async def roll_back(
        self, caller: Caller, name: str, reason: str, epoch: int | None = None
    ) -> Standing:
        """All requests to its control, from now on. epoch: only if it is still that."""
        entry = Entry(caller.name, "RollBackRoute", name, detail=reason)

        def change(standing: Standing) -> Standing:
            check_owned(caller, name, standing)
            if standing.state is State.ROLLED_BACK or epoch not in (None, standing.epoch):
                return standing
            return replace(standing, state=State.ROLLED_BACK, reason=reason[:MAX_REASON])

        return await self._whole.run(entry, self._at_once(name, change, entry))

    async def hold(self, name: str, reason: str, epoch: int) -> Standing:
        """The weights of now, until it is put anew or `resume`d. epoch: as of `roll_back`."""
        entry = Entry(SERVER.name, "HoldRoute", name, detail=reason)

        def change(standing: Standing) -> Standing:
            if not (standing.state is State.ACTIVE or standing.waits) or epoch != standing.epoch:
                return standing
            now = self._clock()
            return replace(
                standing,
                state=State.HELD,
                reason=reason[:MAX_REASON],
                weights=standing.shares(now),
                began=resumed(standing, now).began,
            )

        return await self._whole.run(entry, self._at_once(name, change, entry))

    async def resume(self, name: str, epoch: int) -> Standing:
        """Its ramp goes on where it stood still. epoch: as of `roll_back`."""
        entry = Entry(SERVER.name, "ResumeRoute", name)

        def change(standing: Standing) -> Standing:
            if not standing.waits or epoch != standing.epoch:
                return standing
            return resumed(standing, self._clock())

        return await self._whole.run(entry, self._at_once(name, change, entry))

    async def reweight(self, name: str, epoch: int, weights: Mapping[str, float]) -> None:
        """A bandit's new weights, if the route is what they were drawn for."""
        shown = ", ".join(f"{arm} {weight:.4f}" for arm, weight in weights.items())
        entry = Entry(SERVER.name, "ReweightRoute", name, detail=shown)

        async def reweight() -> None:
            async with self._lock:
                known = self._standings.get(name)
                if known is None or known.epoch != epoch or known.state is not State.ACTIVE:
                    return
                now = self._clock()
                changed = replace(known, weights=dict(weights), bandit_at=now, changed=now)
                await self._pending.put(changed, entry)
                if self._standings.get(name) is known:  # it may have been rolled back
                    self._standings[name] = changed
                log.info("route=%s weights: %s", name, shown)

        await self._whole.run(entry, reweight())

    async def write(self) -> None:
        """What holds and could not be written. StateUnavailable."""
        if self._pending:
            async with self._lock:
                await self._pending.write()

    async def _put(self, caller: Caller, given: pb.Route, entry: Entry) -> Standing:
        async with self._lock:
            before = self._standings.get(given.name)
            if (known := before or self._failed.get(given.name)) is not None:
                if not sees(caller, known):
                    raise NameTaken(
                        f"route.name: {given.name!r} is taken; choose another", field="route.name"
                    )
                check_owned(caller, given.name, known, "route.name")
            route = check(given, self._base, self._pins.pin)
            if given.etag and (before is None or given.etag != before.etag):
                now = f"is {before.etag!r} now" if before else "does not exist"
                raise Changed(
                    f"route.etag: {given.etag!r} is not that of {route.name!r}, which {now}; read "
                    "it again",
                    field="route.etag",
                )
            standing = made(route, known, caller, self._clock())
            with self._coming_as(route.name):
                self._check_free(route, standing.tenant)
                await self._pending.put(standing, entry)
                if self._standings.get(route.name) is not before:  # it was rolled back meanwhile
                    raise Changed(
                        f"route {route.name!r} was rolled back while it was changed; put it again",
                        field="route.name",
                    )
                self._standings[route.name] = standing
                self._failed.pop(route.name, None)
        log.info("route=%s put by %s, epoch %d", route.name, caller.name, standing.epoch)
        return standing

    async def _at_once(
        self, name: str, change: Callable[[Standing], Standing], entry: Entry
    ) -> Standing:
        """Change it, then write it. What was being written at that moment is changed as well."""
        known = self.get(name)
        if (now := change(known)) is not known:
            self._change(now, entry)
        async with self._lock:
            changed = self.get(name)
            if (now := change(changed)) is not changed:
                changed = self._change(now, entry)
            if name in self._pending:
                try:
                    await self._pending.put(changed, entry)
                except StateUnavailable as error:
                    raise StateUnavailable(
                        f"route {name!r} is {changed.state.value}, but that is not written yet: it "
                        f"holds, and is tried again every few seconds. {error}"
                    ) from error
            return changed

    def _change(self, now: Standing, entry: Entry) -> Standing:
        changed = self._standings[now.route.name] = stamped(now, self._clock())
        self._pending.add(changed, entry)
        log.info("route=%s %s: %s", now.route.name, now.state.value, now.reason)
        return changed

    def _check_free(self, route: Route, tenant: str) -> None:
        """NameTaken or InvalidRequest if it cannot be beside what there is."""
        name = route.name
        if self._pins.exists(name):
            raise NameTaken(
                f"route.name: {name!r} is taken by an adapter; choose another", field="route.name"
            )
        others = [s for n, s in self._standings.items() if n != name]
        if len(others) >= MAX_ROUTES:
            refuse("route.name", f"one more than {MAX_ROUTES} routes", "that of a route there is")
        if route.layer is not None:
            check_layer(*route.layer, [o.route.layer for o in others if o.tenant == tenant])

    @contextmanager
    def _coming_as(self, name: str) -> Iterator[None]:
        """Nobody else takes the name meanwhile."""
        self._coming = name
        try:
            yield
        finally:
            self._coming = ""
