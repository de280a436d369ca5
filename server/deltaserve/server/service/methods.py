"""The methods of the services, as every door needs them: what comes in, who may, what answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from deltaserve.server.identity.caller import Role
from deltaserve.server.service.access import NEEDED
from deltaserve.server.service.call import Call

ENDLESS = frozenset({"deltaserve.v1.AdapterService/WatchAdapters"})

Unary = Callable[[Any, Call], Awaitable[Message]]
Streaming = Callable[[Any, Call], AsyncGenerator[Message, None]]


@dataclass(frozen=True, slots=True)
class Method:
    """service: its full name, as ``deltaserve.v1.AdapterService``. request: the class of its
    message. run: `Streaming` if streaming, else `Unary`."""

    service: str
    name: str
    request: type[Message]
    streaming: bool
    role: Role
    run: Any

    @property
    def path(self) -> str:
        """As gRPC has it: ``deltaserve.v1.AdapterService/LoadAdapter``."""
        return f"{self.service}/{self.name}"

    @property
    def endless(self) -> bool:
        """A shutdown does not wait for it."""
        return self.path in ENDLESS


def methods(described: ServiceDescriptor, service: object) -> Iterable[Method]:
    """service: has a coroutine of each method's name, an asynchronous generator if it streams. A
    method that it does not have cannot be called."""
    for method in described.methods:
        if not hasattr(service, method.name):
            continue
        needed = NEEDED[f"{described.full_name}/{method.name}"]
        request = GetMessageClass(method.input_type)
        run = getattr(service, method.name)
        streaming = method.server_streaming
        yield Method(described.full_name, method.name, request, streaming, needed, run)
