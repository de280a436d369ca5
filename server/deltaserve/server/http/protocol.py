"""What uvicorn's HTTP/1.1 connection lacks: limits on slow and on endless headers, a way to cut off
a client that does not read, the subject of a client's certificate."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 20.0
"""From a connection, or the first byte of a request, to the end of its headers."""
HEADER_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """One client's. A request finds it as `scope["state"]["connection"]`."""

    _timer: asyncio.TimerHandle | None = None
    _head = 0

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
        self._wait()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head = 0

    def abort(self) -> None:
        """Close at once; what was written and not taken is lost."""
        self.transport.abort()

    def subject(self) -> str:
        """Of the certificate that the client showed, empty without one: its first alternative
        name, else its common name."""
        secured = self.transport.get_extra_info("ssl_object")
        certificate: dict[str, Any] = (secured.getpeercert() if secured is not None else {}) or {}
        for _, name in certificate.get("subjectAltName", ()):
            return str(name)
        for part in certificate.get("subject", ()):
            for key, value in part:
                if key == "commonName":
                    return str(value)
        return ""

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
