"""What a call can end with. One class per gRPC code that the server uses.

* DeltaserveError
  x InvalidArgument      a field of the request is wrong; `violations` name it
  x NotFound             no such adapter or route
  x AlreadyExists        the adapter's name stands for other content
  x Unauthenticated      the server does not know the caller: no key, or one that is not valid
  x PermissionDenied     the key has not the role; or a path lies outside the adapter roots
  x FailedPrecondition   the request is well-formed, but does not fit this server
  x Aborted              it was overtaken by another request, or not read fast enough
  x ResourceExhausted    a queue or a budget is full; `retry_after` says when to come back
  x Unavailable          the server is not there, or shuts down
  x DeadlineExceeded     the time ran out
  x Cancelled            somebody cancelled the call
  x Unimplemented        the server is older than this client
  x Internal             the server's fault; `metadata` may have the id of its log entry
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request, and what is wrong with it."""

    field: str
    description: str


@dataclass(eq=False)
class DeltaserveError(Exception):
    """Base of the tree. reason: the server's own name of the error, e.g. ``ADAPTER_UNKNOWN``;
    retry_after: seconds."""

    message: str
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = ""
    violations: tuple[Violation, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after: float | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def field(self) -> str:
        """The first field at fault, or an empty string."""
        return self.violations[0].field if self.violations else ""


class InvalidArgument(DeltaserveError):
    """A field of the request is wrong."""


class NotFound(DeltaserveError):
    """No such adapter or route."""


class AlreadyExists(DeltaserveError):
    """The adapter's name stands for other content."""


class Unauthenticated(DeltaserveError):
    """The server does not know the caller."""


class PermissionDenied(DeltaserveError):
    """The key has not the role; or a path lies outside the adapter roots."""


class FailedPrecondition(DeltaserveError):
    """The request is well-formed, but does not fit this server."""


class Aborted(DeltaserveError):
    """It was overtaken by another request, or not read fast enough."""


class ResourceExhausted(DeltaserveError):
    """A queue or a budget is full."""


class Unavailable(DeltaserveError):
    """The server is not there, or shuts down."""


class DeadlineExceeded(DeltaserveError):
    """The time ran out."""


class Cancelled(DeltaserveError):
    """Somebody cancelled the call."""


class Unimplemented(DeltaserveError):
    """The server is older than this client."""


class Internal(DeltaserveError):
    """The server's fault."""


_CLASSES: dict[grpc.StatusCode, type[DeltaserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: Internal,
}


@contextmanager
def typed() -> Iterator[None]:
    """grpc's errors as those of this module."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from None


def from_rpc(error: grpc.RpcError) -> DeltaserveError:
    """The typed error for one of grpc's, with the details that the server packed into it."""
    code = error.code()
    made = _CLASSES.get(code, DeltaserveError)(error.details() or code.name, code)
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status: not from our server
        status = None
    for packed in status.details if status is not None else ():
        _unpack(packed, made)
    return made


def _unpack(packed: object, into: DeltaserveError) -> None:
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    if packed.Unpack(info):  # type: ignore[attr-defined]
        into.reason = info.reason
        into.metadata = dict(info.metadata)
    elif packed.Unpack(bad):  # type: ignore[attr-defined]
        into.violations = tuple(Violation(v.field, v.description) for v in bad.field_violations)
    elif packed.Unpack(retry):  # type: ignore[attr-defined]
        into.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
