"""AdapterService: adapters in, out, and watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TYPE_CHECKING

from deltaserve.server.engine.core import AdapterInfo
from deltaserve.server.errors import ShuttingDown
from deltaserve.server.identity.sight import Sight
from deltaserve.server.routes.book import RouteBook
from deltaserve.server.service import answer, convert
from deltaserve.server.service.call import Call
from deltaserve.server.service.kept import Kept
from deltaserve.v1 import adapter_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine
    from deltaserve.server.state.store import Store

MAX_PAGE = 1000


class Watcher:
    """The latest state of each adapter that a client has not been told of. sees: whether it may
    know of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sees: Callable[[str], bool]) -> None:
        self._loop = loop
        self._sees = sees
        self._changed: dict[str, AdapterInfo] = {}
        self._news = asyncio.Event()
        self._closed = False

    def tell(self, info: AdapterInfo) -> None:
        """From any thread."""

        def change() -> None:
            """Asked in the loop, in the order of the changes: what goes is still its owner's."""
            if self._sees(info.name):
                self._changed[info.name] = info
                self._news.set()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(change)

    def close(self) -> None:
        """The server shuts down."""
        self._closed = True
        self._news.set()

    async def take(self) -> list[AdapterInfo]:
        """Wait for changes; ShuttingDown at the end."""
        await self._news.wait()
        self._news.clear()
        if self._closed:
            raise ShuttingDown("the server is shutting down; watch another")
        changed, self._changed = self._changed, {}
        return list(changed.values())


class AdapterService:
    """A call that goes away does not undo what it began. book: of the routes, whose names and
    adapters are theirs. store: keeps what it changes. sight: who may see what."""

    def __init__(self, engine: Engine, book: RouteBook, store: Store | None, sight: Sight) -> None:
        self._book = book
        self._adapters = engine.adapters
        self._sight = sight
        self._kept = Kept(engine.adapters, store, sight)
        self._base = engine.info().names
        self._watchers: set[Watcher] = set()

    def close(self) -> None:
        """End every watch."""
        for watcher in list(self._watchers):
            watcher.close()

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, call: Call
    ) -> pb.LoadAdapterResponse:
        name = convert.adapter_name(request.name, self._base)
        self._book.check_adapter_name(name)
        options = convert.load_options(request.options)
        if options.parent:
            self._sight.check(call.caller, options.parent, "options.parent")
        info = await self._kept.load(
            call.caller,
            name,
            convert.uri(request.uri),
            pinned=request.pinned,
            options=options,
            register_only=request.register_only,
            return_early=request.return_early,
            shared=request.shared,
        )
        return pb.LoadAdapterResponse(adapter=self._shown(info, call))

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, call: Call
    ) -> pb.UnloadAdapterResponse:
        if self._sight.owns(call.caller, request.name):
            self._book.check_unused(call.caller, request.name)
        freed = await self._kept.unload(call.caller, request.name)
        return pb.UnloadAdapterResponse(freed_bytes=freed)

    async def GetAdapter(self, request: pb.GetAdapterRequest, call: Call) -> pb.GetAdapterResponse:
        self._sight.check_name(call.caller, request.name)
        info = self._adapters.get(request.name)
        return pb.GetAdapterResponse(adapter=self._shown(info, call))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, call: Call
    ) -> pb.ListAdaptersResponse:
        if request.page_size > MAX_PAGE:
            convert.refuse("page_size", str(request.page_size), f"at most {MAX_PAGE}")
        after = request.page_token
        found = [a for a in self._seen(call) if a.name > after]
        size = request.page_size or MAX_PAGE
        page = found[:size]
        return pb.ListAdaptersResponse(
            adapters=[self._shown(a, call) for a in page],
            next_page_token=page[-1].name if len(found) > size else "",
        )

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, call: Call
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        sees = partial(self._sight.sees, call.caller)
        watcher = Watcher(asyncio.get_running_loop(), sees)
        self._watchers.add(watcher)
        unsubscribe = self._adapters.subscribe(watcher.tell)
        try:
            adapters, snapshot = self._seen(call), True
            while True:
                shown = [self._shown(a, call) for a in adapters]
                yield pb.WatchAdaptersResponse(snapshot=snapshot, adapters=shown)
                adapters, snapshot = await watcher.take(), False
        finally:
            unsubscribe()
            self._watchers.discard(watcher)

    async def PinAdapter(self, request: pb.PinAdapterRequest, call: Call) -> pb.PinAdapterResponse:
        info = await self._kept.pin(call.caller, request.name, request.pinned)
        return pb.PinAdapterResponse(adapter=self._shown(info, call))

    def _seen(self, call: Call) -> list[AdapterInfo]:
        return [a for a in self._adapters.list() if self._sight.sees(call.caller, a.name)]

    def _shown(self, info: AdapterInfo, call: Call) -> pb.Adapter:
        """A parent that the caller may not see is not named."""
        shown, owner = answer.adapter(info), self._sight.owner(info.name)
        shown.tenant, shown.shared = owner.tenant, owner.shared
        if not self._sight.sees(call.caller, info.parent):
            shown.parent = ""
        return shown
