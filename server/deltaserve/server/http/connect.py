"""Our services over HTTP: the Connect protocol (https://connectrpc.com/docs/protocol), so that a
browser, curl or a Connect client calls what gRPC clients call. Unary methods and servers' streams,
as JSON or as protobuf.

    curl -H 'Content-Type: application/json' -d '{}' HOST/deltaserve.v1.AdapterService/ListAdapters
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from google.protobuf.message import Message
from grpc import StatusCode
from starlette.requests import Request
from starlette.responses import Response

from deltaserve.server.config import RpcConfig
from deltaserve.server.errors import InvalidRequest
from deltaserve.server.http import body, codec
from deltaserve.server.http.errors import STATUSES, HttpError
from deltaserve.server.http.events import EventStream
from deltaserve.server.http.gate import Gate, endless, unless_gone
from deltaserve.server.metrics import Metrics
from deltaserve.server.service.call import Call
from deltaserve.server.service.methods import Method
from deltaserve.server.service.services import Services
from deltaserve.server.service.status import to_status

_UNARY = "application/"
_STREAM = "application/connect+"
_VERSION, _TIMEOUT = "connect-protocol-version", "connect-timeout-ms"
_TIMEOUT_DIGITS = 10


class Connect:
    """A path for each method."""

    def __init__(self, services: Services, gate: Gate, config: RpcConfig, metrics: Metrics) -> None:
        self._gate = gate
        self._config = config
        self._metrics = metrics
        self.router = APIRouter()
        for methods in services.methods().values():
            for method in methods:
                self.router.add_api_route(f"/{method.path}", self._of(method), methods=["POST"])

    def _of(self, method: Method) -> Any:
        run = self._stream if method.streaming else self._answer

        async def endpoint(request: Request) -> Response:
            return await run(method, request)

        return endpoint

    async def _answer(self, method: Method, request: Request) -> Response:
        form, most = _form(request, _UNARY), self._config.max_message_bytes
        if form is None:
            return _unsupported(_UNARY)
        try:
            call = self._call(method, request)
            gzip = _is_gzip(request, "content-encoding")
            data = await body.read(request, most)
            data = codec.unzipped(data, most) if gzip else data
            message = codec.decode(data, method.request, form)
            answer: Message = await unless_gone(request, method.run(message, call))
            data = await codec.encode(answer, form)
        except Exception as error:
            code, told = self._told(method, error)
            return Response(
                codec.dump(told), STATUSES.get(code, 500), _headers(error), "application/json"
            )
        self._metrics.on_rpc(method.path, StatusCode.OK.name)
        return Response(data, headers=_NO_STORE, media_type=_UNARY + form)

    async def _stream(self, method: Method, request: Request) -> Response:
        form, most = _form(request, _STREAM), self._config.max_message_bytes
        if form is None:
            return _unsupported(_STREAM)
        source: AsyncGenerator[Message, None]
        try:
            call = self._call(method, request)
            gzip = _is_gzip(request, "connect-content-encoding")
            data = codec.opened(await body.read(request, most), gzip=gzip, most=most)
            message = codec.decode(data, method.request, form)
            source = self._confirmed(method.run(message, call), call)
            if method.endless:
                endless(request)
        except Exception as error:  # the protocol has it that a stream begins and ends with it
            source = _failed(error)
        envelopes = self._envelopes(method, source, form)
        seconds = self._config.write_seconds
        return EventStream(request, envelopes, source, seconds, _STREAM + form)

    async def _confirmed(
        self, source: AsyncGenerator[Message, None], call: Call
    ) -> AsyncGenerator[Message, None]:
        async with aclosing(source):
            async for message in source:
                self._gate.confirm(call)
                yield message

    async def _envelopes(
        self, method: Method, source: AsyncGenerator[Message, None], form: str
    ) -> AsyncGenerator[bytes, None]:
        code: StatusCode = StatusCode.CANCELLED
        end: dict[str, Any] = {}
        try:
            try:
                async with aclosing(source) as messages:
                    async for message in messages:
                        yield codec.envelope(await codec.encode(message, form))
                code = StatusCode.OK
            except Exception as error:
                code, told = _told(error)
                end = {"error": told}
            yield codec.envelope(codec.dump(end), end=True)
        finally:
            self._metrics.on_rpc(method.path, code.name)

    def _call(self, method: Method, request: Request) -> Call:
        version = request.headers.get(_VERSION, "1")
        if version != "1":
            raise InvalidRequest(f"{_VERSION}: {body.shown(version)} is not possible; it must be 1")
        call = self._gate.enter(request, method.role)
        given = request.headers.get(_TIMEOUT)
        if given is None:
            return call
        if not (given.isascii() and given.isdecimal() and len(given) <= _TIMEOUT_DIGITS):
            right = f"milliseconds, of at most {_TIMEOUT_DIGITS} digits"
            raise InvalidRequest(f"{_TIMEOUT}: {body.shown(given)}; it must be {right}")
        return replace(call, seconds=int(given) / 1000)

    def _told(self, method: Method, error: Exception) -> tuple[StatusCode, dict[str, Any]]:
        code, told = _told(error)
        self._metrics.on_rpc(method.path, code.name)
        return code, told


_NO_STORE = {"cache-control": "no-store"}
_HTTP = {
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    501: StatusCode.UNIMPLEMENTED,
}


def _told(error: Exception) -> tuple[StatusCode, dict[str, Any]]:
    if isinstance(error, HttpError):
        code = _HTTP.get(error.status, StatusCode.INVALID_ARGUMENT)
        return code, {"code": code.name.lower(), "message": str(error)}
    code, status = to_status(error)
    return code, codec.error(code, status)


def _headers(error: Exception) -> dict[str, str]:
    closed = {"connection": "close"} if isinstance(error, HttpError) and error.close else {}
    return {**_NO_STORE, **closed}


def _form(request: Request, prefix: str) -> str | None:
    """Of the body; None if it is neither JSON nor protobuf."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = given.removeprefix(prefix)
    return form if given.startswith(prefix) and form in (codec.JSON, codec.PROTO) else None


def _is_gzip(request: Request, header: str) -> bool:
    """Whether what was sent is compressed."""
    given = request.headers.get(header, "identity")
    if given not in ("identity", "gzip"):
        text = f"{header}: {body.shown(given)} is not possible; it must be gzip or identity"
        raise HttpError(501, text, code="unimplemented", close=True)
    return given == "gzip"


def _unsupported(prefix: str) -> Response:
    taken = f"{prefix}{codec.JSON}, {prefix}{codec.PROTO}"
    return Response(status_code=415, headers={"accept-post": taken, "connection": "close"})


async def _failed(error: Exception) -> AsyncGenerator[Message, None]:
    raise error
    yield
