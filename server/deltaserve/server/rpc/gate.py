"""Gate: what every call over gRPC passes through. It decodes safely, asks who calls, counts,
refuses while the server drains, writes streams, and turns whatever is raised into a status."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from deltaserve.server.errors import SlowReader
from deltaserve.server.identity.caller import Credentials
from deltaserve.server.identity.certificate import subjects
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.metrics import Metrics
from deltaserve.server.service.call import Call
from deltaserve.server.service.methods import Method
from deltaserve.server.service.status import to_status
from deltaserve.server.service.traffic import Traffic

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

BEARER = "bearer "
CERTIFICATE = {
    "x509_subject": "subject",
    "peer_dns": "dns",
    "peer_uri": "uri",
    "peer_email": "email",
    "peer_ip": "ip",
}
"""gRPC's names of what is in the client's certificate."""
CORRELATION = "x-correlation-id"


class Gate:
    """Between gRPC and the services, which know nothing of it. write_seconds: how long a client may
    not read before its stream is ended."""

    def __init__(
        self, traffic: Traffic, doorman: Doorman, metrics: Metrics, write_seconds: float
    ) -> None:
        self._traffic = traffic
        self._doorman = doorman
        self._metrics = metrics
        self._write_seconds = write_seconds

    def handler(self, service: str, methods: Iterable[Method]) -> grpc.GenericRpcHandler:
        """What a gRPC server takes for the methods of one service."""
        return grpc.method_handlers_generic_handler(service, {m.name: self._of(m) for m in methods})

    def _of(self, method: Method) -> Any:
        kind = (
            grpc.unary_stream_rpc_method_handler
            if method.streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return kind(
            self._guarded(method),
            request_deserializer=_safely(method.request.FromString),
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _guarded(self, method: Method) -> Any:
        run = self._stream if method.streaming else self._answer
        endless = method.endless

        async def call(request: Any, context: Context) -> Any:
            code = grpc.StatusCode.CANCELLED
            try:
                with self._traffic.running(endless=endless):
                    response = await run(method, request, context)
                code = grpc.StatusCode.OK
                return response
            except Exception as error:
                code, status = to_status(error)
                await context.abort_with_status(rpc_status.to_status(status))
            finally:
                self._metrics.on_rpc(method.path, code.name)

        return call

    async def _answer(self, method: Method, request: Any, context: Context) -> Message:
        answer: Message = await method.run(request, self._call(method, request, context))
        return answer

    async def _stream(self, method: Method, request: Any, context: Context) -> None:
        call = self._call(method, request, context)
        async with aclosing(method.run(request, call)) as messages:
            async for message in messages:
                self._doorman.confirm(call.caller)
                await self._write(context, message)

    def _call(self, method: Method, request: Any, context: Context) -> Call:
        """Who calls, if the call can be taken."""
        self._traffic.check()
        caller = self._doorman.admit(credentials(context), method.role)
        if isinstance(request, DecodeError):
            raise request
        return Call(caller, context.time_remaining(), metadata(context, CORRELATION))

    async def _write(self, context: Context, message: Message) -> None:
        limit = self._write_seconds
        try:
            async with asyncio.timeout(limit):
                await context.write(message)
        except TimeoutError:
            raise SlowReader(f"the stream was not read for {limit:g} s") from None


def metadata(context: Context, key: str) -> str:
    """A text of the client's metadata; empty if there is none."""
    for name, value in context.invocation_metadata() or ():
        if name == key and isinstance(value, str):
            return value
    return ""


def credentials(context: Context) -> Credentials:
    """What the client shows."""
    token = ""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str) and value.lower().startswith(BEARER):
            token = value[len(BEARER) :].strip()
    shown = context.auth_context()
    names = [
        (kind, name.decode(errors="replace"))
        for key, kind in CERTIFICATE.items()
        for name in shown.get(key, ())
    ]
    return Credentials(unquote(context.peer()), token, subjects(names))


def _safely(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Bytes that are no message become the request, for the call to refuse: an exception here
    would reach the client as UNKNOWN."""

    def safe(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return DecodeError(f"the request's bytes are not a valid message: {error}")

    return safe
