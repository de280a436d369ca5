"""What uvicorn's HTTP/1.1 connection lacks: limits on slow and on endless headers, a way to cut off
a client that does not read, errors in the shape of all others, the names in a client's
certificate."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deltaserve.server.http.errors import HttpError, response
from deltaserve.server.identity.certificate import from_ssl

HEADER_SECONDS = 20.0
"""From a connection, or the first byte of a request, to the end of its headers."""
HEADER_BYTES = 64 << 10
LEFT_BYTES = 64 << 20
"""Of a body that was refused, so many are read and forgotten: a client that is cut off while it
sends does not see why."""


class Connection(HttpToolsProtocol):
    """One client's. A request finds it as `scope["state"]["connection"]`."""

    _timer: asyncio.TimerHandle | None = None
    _head = 0
    _left = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self._timer is not None and self._head > HEADER_BYTES:
            self.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        self._left = 0
        self._wait()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._left += len(body)
            if self._left > LEFT_BYTES:
                self.abort()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head = 0

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets the last answer of its connection."""
        refused = response(HttpError(400, msg, code="malformed_http", close=True))
        headers = [*self.server_state.default_headers, *refused.raw_headers]
        lines = [b"HTTP/1.1 400 Bad Request", *(b": ".join(header) for header in headers)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(refused.body)]))
        self.transport.close()

    def abort(self) -> None:
        """Close at once; what was written and not taken is lost."""
        self.transport.abort()

    def subjects(self) -> tuple[str, ...]:
        """The names in the certificate that the client showed; none without one."""
        secured = self.transport.get_extra_info("ssl_object")
        return () if secured is None else from_ssl(secured.getpeercert())

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
