"""Exception -> gRPC status: the one place in the project that decides codes.

Files that are not what they say are INVALID_ARGUMENT; files that are well-formed, but cannot be
served on this base by this server, are FAILED_PRECONDITION. What is not in the table is a bug of
ours: INTERNAL with the id of a log entry, and none of the exception's text.
"""

from __future__ import annotations

import logging
import uuid

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from deltaserve.adapters import errors as adapters
from deltaserve.server import errors as requests

log = logging.getLogger(__name__)

DOMAIN = "deltaserve"
_MAX_TEXT = 1024
"""Characters of a message: details travel in trailers, which clients limit to 8 KiB."""

Code = grpc.StatusCode

TABLE: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    requests.Unauthenticated: (Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    requests.Forbidden: (Code.PERMISSION_DENIED, "ROLE_MISSING"),
    requests.QuotaExceeded: (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    requests.IdentityUnknown: (Code.NOT_FOUND, "IDENTITY_UNKNOWN"),
    requests.IdentityConflict: (Code.FAILED_PRECONDITION, "IDENTITY_CONFLICT"),
    requests.InvalidRequest: (Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    requests.AdapterUnknown: (Code.NOT_FOUND, "ADAPTER_UNKNOWN"),
    requests.RequestUnknown: (Code.NOT_FOUND, "REQUEST_UNKNOWN"),
    requests.AdapterConflict: (Code.ALREADY_EXISTS, "ADAPTER_CONFLICT"),
    requests.AdapterBusy: (Code.ABORTED, "ADAPTER_BUSY"),
    requests.AdapterTooLarge: (Code.RESOURCE_EXHAUSTED, "ADAPTER_TOO_LARGE"),
    requests.AdapterUnavailable: (Code.FAILED_PRECONDITION, "ADAPTER_UNAVAILABLE"),
    requests.RouteUnknown: (Code.NOT_FOUND, "ROUTE_UNKNOWN"),
    requests.RouteUnavailable: (Code.FAILED_PRECONDITION, "ROUTE_UNAVAILABLE"),
    requests.Changed: (Code.ABORTED, "CHANGED"),
    requests.NameTaken: (Code.ALREADY_EXISTS, "NAME_TAKEN"),
    requests.NonFiniteLogits: (Code.FAILED_PRECONDITION, "NON_FINITE_LOGITS"),
    requests.Overloaded: (Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
    requests.Cancelled: (Code.CANCELLED, "CANCELLED"),
    requests.DeadlineExceeded: (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    requests.ShuttingDown: (Code.UNAVAILABLE, "SHUTTING_DOWN"),
    requests.StateUnavailable: (Code.UNAVAILABLE, "STATE_UNAVAILABLE"),
    requests.AnswerUnknown: (Code.NOT_FOUND, "ANSWER_UNKNOWN"),
    requests.UserNotExposed: (Code.FAILED_PRECONDITION, "USER_NOT_EXPOSED"),
    requests.EngineFailure: (Code.INTERNAL, "ENGINE_FAILURE"),
    requests.SlowReader: (Code.ABORTED, "SLOW_READER"),
    adapters.AdapterNotFound: (Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
    adapters.SourceForbidden: (Code.PERMISSION_DENIED, "SOURCE_FORBIDDEN"),
    adapters.MalformedAdapter: (Code.INVALID_ARGUMENT, "ADAPTER_MALFORMED"),
    adapters.UnsupportedAdapter: (Code.FAILED_PRECONDITION, "ADAPTER_UNSUPPORTED"),
    adapters.InvalidAdapter: (Code.FAILED_PRECONDITION, "ADAPTER_INVALID"),
    adapters.BaseMismatch: (Code.FAILED_PRECONDITION, "BASE_MISMATCH"),
    DecodeError: (Code.INVALID_ARGUMENT, "UNDECODABLE"),
}


def reason(error: Exception) -> str:
    """As in its ErrorInfo."""
    return next((TABLE[kind][1] for kind in type(error).__mro__ if kind in TABLE), "BUG")


def to_status(error: Exception) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The code, and the status with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            code, reason = TABLE[kind]
            return code, _status(code, reason, str(error), error)
    incident = uuid.uuid4().hex[:12]
    log.error("incident %s", incident, exc_info=error)
    text = f"internal error; incident {incident} in the server's log"
    return Code.INTERNAL, _status(Code.INTERNAL, "BUG", text, error, incident=incident)


def _status(
    code: grpc.StatusCode, reason: str, text: str, error: Exception, **metadata: str
) -> status_pb2.Status:
    text = text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    ]
    field: str = getattr(error, "field", "")
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field[:_MAX_TEXT], description=text
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after: float | None = getattr(error, "retry_after", None)
    if retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return status
