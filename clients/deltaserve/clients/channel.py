"""A client's connection: its settings, who it trusts, and what it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
POLL_SECONDS = 0.1
"""Between two looks at a server that is not ready yet."""


def tls(
    ca: Path | str | None = None,
    certificate: Path | str | None = None,
    key: Path | str | None = None,
) -> grpc.ChannelCredentials | None:
    """Of PEM files. ca: whom to trust, by default the authorities that gRPC brings. certificate,
    key: what to show a server that asks for it. None if none is given: plain text."""
    if (certificate is None) != (key is None):
        raise ValueError("certificate and key: give both or none")
    if ca is None and certificate is None:
        return None
    read = [None if f is None else Path(f).read_bytes() for f in (ca, key, certificate)]
    return grpc.ssl_channel_credentials(*read)


def _with_token(details: Any, token: str) -> Any:
    metadata = [*(details.metadata or ()), ("authorization", f"Bearer {token}")]
    return details._replace(metadata=metadata)


class Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Shows an API key with every call."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, m: Any) -> Any:
        return continuation(_with_token(details, self._token), m)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, m: Any) -> Any:
        return continuation(_with_token(details, self._token), m)


class AsyncUnaryBearer(grpc.aio.UnaryUnaryClientInterceptor):
    """Shows an API key with every call that is answered once."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], details: Any, request: Any
    ) -> Any:
        return await continuation(_with_token(details, self._token), request)


class AsyncStreamBearer(grpc.aio.UnaryStreamClientInterceptor):
    """Shows an API key with every call that is answered by a stream."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], details: Any, request: Any
    ) -> Any:
        return await continuation(_with_token(details, self._token), request)
