"""Kept: adapters that come and go, and what is written down of it before the client is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from deltaserve.adapters.options import LoadOptions
from deltaserve.server.engine.core import AdapterInfo, AdapterState
from deltaserve.server.errors import AdapterBusy, AdapterUnknown, ShuttingDown, StateUnavailable
from deltaserve.server.identity.caller import Caller
from deltaserve.server.identity.sight import Sight
from deltaserve.server.service.status import reason
from deltaserve.server.state.records import AdapterRecord, Entry, dump

if TYPE_CHECKING:
    from deltaserve.server.engine.adapter_cache import AdapterCache
    from deltaserve.server.state.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")


class Kept:
    """A change is made in memory first, where it is refused if it is not possible, and then
    written. What cannot be written is served all the same, and the client told: StateUnavailable.
    store: None keeps nothing. sight: whose they are. A client that goes away does not undo what it
    began."""

    def __init__(self, adapters: AdapterCache, store: Store | None, sight: Sight) -> None:
        self._adapters = adapters
        self._sight = sight
        self._store = store
        self._running: set[asyncio.Task[Any]] = set()

    async def load(
        self,
        caller: Caller,
        name: str,
        uri: str,
        *,
        pinned: bool,
        options: LoadOptions,
        register_only: bool,
        return_early: bool,
        shared: bool = False,
    ) -> AdapterInfo:
        """`AdapterCache.load`. return_early: do not wait until it is done."""
        who = caller.name
        record = AdapterRecord(name, uri, dump(options), "", pinned, register_only, who)
        entry = Entry(who, "LoadAdapter", name)

        async def load() -> AdapterInfo:
            owner = self._sight.claim(caller, name, shared=shared, taken=self._registered(name))
            nonlocal record
            record = replace(record, tenant=owner.tenant, shared=owner.shared)
            future = self._adapters.load(
                name, uri, pinned=pinned, options=options, register_only=register_only
            )
            if not return_early or future.done():
                return await self._settle(record, entry, future)
            if self._store is not None:
                try:
                    await _written(self._store.begin(record, entry))
                finally:
                    self._go_on(self._settle_begun(record, future))
            return self._adapters.get(name)

        return await self._whole(entry, load())

    async def unload(self, caller: Caller, name: str) -> int:
        """`AdapterCache.unload`; also of one that only the state knows, 0 bytes."""
        entry = Entry(caller.name, "UnloadAdapter", name)

        async def unload() -> int:
            self._sight.check_owner(caller, name, taken=self._registered(name))
            self._check_children(caller, name)
            try:
                future = self._adapters.unload(name)
            except AdapterUnknown:
                if self._store is None or not await self._store.remove(name, entry):
                    raise
                self._sight.forget(name)
                return 0
            if self._store is not None and not await _written(self._store.remove(name, entry)):
                await _written(self._store.note(entry))
            freed = await result(future)
            if not self._registered(name):  # it may have been loaded anew
                self._sight.forget(name)
            return freed

        return await self._whole(entry, unload())

    async def pin(self, caller: Caller, name: str, pinned: bool) -> AdapterInfo:
        """`AdapterCache.pin`."""
        entry = Entry(caller.name, "PinAdapter" if pinned else "UnpinAdapter", name)

        async def pin() -> AdapterInfo:
            self._sight.check_owner(caller, name, taken=self._registered(name))
            info = self._adapters.pin(name, pinned)
            if self._store is not None:
                await _written(self._store.pin(name, pinned, entry))
            return info

        return await self._whole(entry, pin())

    def _check_children(self, caller: Caller, name: str) -> None:
        """The cache names those that must be unloaded first; not to everybody."""
        for child in self._adapters.list():
            if child.parent == name and not self._sight.sees(caller, child.name):
                raise AdapterBusy(
                    f"adapter {name!r} is the parent of adapters of other tenants", field="name"
                )

    def _registered(self, name: str) -> bool:
        try:
            self._adapters.get(name)
        except AdapterUnknown:
            return False
        return True

    async def _settle(
        self, record: AdapterRecord, entry: Entry, future: Future[AdapterInfo]
    ) -> AdapterInfo:
        info = await result(future)

        def make() -> AdapterRecord | None:
            """It may have been unloaded since."""
            try:
                now = self._adapters.get(record.name)
            except AdapterUnknown:
                return None
            if now.digest != info.digest or now.state is AdapterState.UNLOADING:
                return None
            return AdapterRecord(
                record.name,
                info.uri,
                record.options,
                info.digest,
                now.pinned,
                record.register_only,
                record.owner,
                tenant=record.tenant,
                shared=record.shared,
            )

        if self._store is not None:
            await _written(self._store.keep(make, entry))
        return info

    async def _settle_begun(self, record: AdapterRecord, future: Future[AdapterInfo]) -> None:
        """After the client was told that the load has begun."""
        assert self._store is not None
        entry = Entry(record.owner, "LoadAdapter", record.name)
        try:
            await self._settle(record, entry, future)
        except (ShuttingDown, StateUnavailable) as error:  # the next start loads it
            log.warning("--state: adapter %r: %s", record.name, error)
        except Exception as error:
            failed = _failed(entry, error)
            try:
                if not await self._store.remove(record.name, failed, begun=True):
                    await self._store.note(failed)
            except StateUnavailable as unavailable:
                log.warning("--state: %s", unavailable)

    async def _whole(self, entry: Entry, work: Coroutine[Any, Any, T]) -> T:
        """Also when the client goes away. What is refused is noted."""
        return await asyncio.shield(self._go_on(self._noted(entry, work)))

    async def _noted(self, entry: Entry, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except Exception as error:
            if self._store is not None and not isinstance(error, StateUnavailable | ShuttingDown):
                try:
                    await self._store.note(_failed(entry, error))
                except StateUnavailable as unavailable:
                    log.warning("--state: %s was refused: %s", entry.verb, unavailable)
            raise

    def _go_on(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # the client may have gone; it is noted already


async def result(future: Future[T]) -> T:
    """Its result. A client that goes away must not cancel what the engine is to fulfil."""
    return await asyncio.shield(asyncio.wrap_future(future))


async def _written(change: Coroutine[Any, Any, T]) -> T:
    try:
        return await change
    except StateUnavailable as error:
        raise StateUnavailable(
            f"the change is made, but not kept: it holds until the server ends. {error}. Ask again "
            "when that is mended"
        ) from error


def _failed(entry: Entry, error: Exception) -> Entry:
    return Entry(entry.who, entry.verb, entry.name, reason(error), detail=str(error))
