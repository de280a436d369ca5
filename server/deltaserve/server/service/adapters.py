"""AdapterService: adapters in, out, and watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from deltaserve.server.engine.core import AdapterInfo
from deltaserve.server.errors import ShuttingDown
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
    """The latest state of each adapter that a client has not been told of."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed: dict[str, AdapterInfo] = {}
        self._news = asyncio.Event()
        self._closed = False

    def tell(self, info: AdapterInfo) -> None:
        """From any thread."""
        self._call(lambda: self._changed.update({info.name: info}))

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

    def _call(self, change: Callable[[], None]) -> None:
        def apply() -> None:
            change()
            self._news.set()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(apply)


class AdapterService:
    """A call that goes away does not undo what it began. book: of the routes, whose names and
    adapters are theirs. store: keeps what it changes."""

    def __init__(self, engine: Engine, book: RouteBook, store: Store | None = None) -> None:
        self._book = book
        self._adapters = engine.adapters
        self._kept = Kept(engine.adapters, store)
        self._base = engine.info().base
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
        info = await self._kept.load(
            call.caller.name,
            name,
            convert.uri(request.uri),
            pinned=request.pinned,
            options=convert.load_options(request.options),
            register_only=request.register_only,
            return_early=request.return_early,
        )
        return pb.LoadAdapterResponse(adapter=answer.adapter(info))

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, call: Call
    ) -> pb.UnloadAdapterResponse:
        self._book.check_unused(request.name)
        freed = await self._kept.unload(call.caller.name, request.name)
        return pb.UnloadAdapterResponse(freed_bytes=freed)

    async def GetAdapter(self, request: pb.GetAdapterRequest, call: Call) -> pb.GetAdapterResponse:
        return pb.GetAdapterResponse(adapter=answer.adapter(self._adapters.get(request.name)))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, call: Call
    ) -> pb.ListAdaptersResponse:
        if request.page_size > MAX_PAGE:
            convert.refuse("page_size", str(request.page_size), f"at most {MAX_PAGE}")
        after = request.page_token
        found = [a for a in self._adapters.list() if a.name > after]
        size = request.page_size or MAX_PAGE
        page = found[:size]
        return pb.ListAdaptersResponse(
            adapters=[answer.adapter(a) for a in page],
            next_page_token=page[-1].name if len(found) > size else "",
        )

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, call: Call
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        watcher = Watcher(asyncio.get_running_loop())
        self._watchers.add(watcher)
        unsubscribe = self._adapters.subscribe(watcher.tell)
        try:
            adapters, snapshot = self._adapters.list(), True
            while True:
                shown = [answer.adapter(a) for a in adapters]
                yield pb.WatchAdaptersResponse(snapshot=snapshot, adapters=shown)
                adapters, snapshot = await watcher.take(), False
        finally:
            unsubscribe()
            self._watchers.discard(watcher)

    async def PinAdapter(self, request: pb.PinAdapterRequest, call: Call) -> pb.PinAdapterResponse:
        info = await self._kept.pin(call.caller.name, request.name, request.pinned)
        return pb.PinAdapterResponse(adapter=answer.adapter(info))
