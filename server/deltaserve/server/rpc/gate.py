"""Gate: what every call of our services passes through. It decodes safely, counts, refuses while
the server drains, and turns whatever is raised into a status."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from deltaserve.server.errors import ShuttingDown
from deltaserve.server.metrics import Metrics
from deltaserve.server.rpc.status import to_status

PREFIX = "/deltaserve.v1."
ENDLESS = frozenset({"/deltaserve.v1.AdapterService/WatchAdapters"})
"""Calls that a shutdown does not wait for."""

Behaviour = Callable[[Any, Any], Awaitable[Any]]


class Gate(grpc.aio.ServerInterceptor):
    """draining: refuse new calls. `idle` waits until none is left."""

    def __init__(self, metrics: Metrics) -> None:
        self.draining = False
        self._metrics = metrics
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until no call is running."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(PREFIX):
            return handler
        if handler.response_streaming:
            kind, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            kind, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return kind(
            self._wrapped(method, behaviour),
            request_deserializer=_safely(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _wrapped(self, method: str, behaviour: Behaviour) -> Behaviour:
        name = method.removeprefix(PREFIX)
        counted = method not in ENDLESS

        async def call(request: Any, context: Any) -> Any:
            code = grpc.StatusCode.CANCELLED
            self._enter(counted)
            try:
                response = await self._run(behaviour, request, context)
                code = grpc.StatusCode.OK
                return response
            except Exception as error:
                code, status = to_status(error)
                await context.abort_with_status(rpc_status.to_status(status))
            finally:
                self._leave(counted)
                self._metrics.on_rpc(name, code.name)

        return call

    async def _run(self, behaviour: Behaviour, request: Any, context: Any) -> Any:
        if isinstance(request, DecodeError):
            raise request
        if self.draining:
            raise ShuttingDown("the server is shutting down and takes no new calls")
        return await behaviour(request, context)

    def _enter(self, counted: bool) -> None:
        self._active += counted
        if self._active:
            self._idle.clear()

    def _leave(self, counted: bool) -> None:
        self._active -= counted
        if not self._active:
            self._idle.set()


def _safely(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Bytes that are no message become the request, for the call to refuse: an exception here
    would reach the client as UNKNOWN."""

    def safe(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return DecodeError(f"the request's bytes are not a valid message: {error}")

    return safe
