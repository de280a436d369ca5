"""Answers that are streams, of server-sent events or other pieces, and the merging of several
streams into one."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Sends events until there are no more, the client goes away, or does not read for so many
    seconds; then its connection is cut. In any case the generators are closed: that of the events,
    and their source, for a generator that has not begun closes nothing. media_type: of events that
    are not server-sent ones."""

    def __init__(
        self,
        request: Request,
        events: AsyncGenerator[str | bytes, None],
        source: AsyncGenerator[Any, None],
        write_seconds: float,
        media_type: str = "text/event-stream",
    ) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type=media_type, headers=headers)
        self._request = request
        self._events = events
        self._source = source
        self._write_seconds = write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source), aclosing(self._events):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        head: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await self._write(send, head)
        async for data in self._events:
            body = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
            await self._write(send, {"type": "http.response.body", "body": body, "more_body": True})
        await self._write(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                await send(message)
        except TimeoutError:
            log.info("a stream was not read for %g s and is ended", self._write_seconds)
            connection = self._request.scope["state"].get("connection")
            if connection is not None:
                connection.abort()
            await asyncio.Event().wait()  # until the disconnection cancels this


async def merged(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """What the streams give, as it comes, with the number of the stream."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    ready: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(len(streams))

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    await ready.put((number, item))
        except Exception as error:
            end = error
        await ready.put(end)

    pumps = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            found = await ready.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
