"""Errors in OpenAI's shape: ``{"error": {message, type, param, code}}``, with an HTTP status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc import StatusCode
from starlette.responses import JSONResponse

from deltaserve.server.service.status import to_status

STATUSES = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.OUT_OF_RANGE: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.ALREADY_EXISTS: 409,
    StatusCode.ABORTED: 409,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.CANCELLED: 499,
    StatusCode.UNIMPLEMENTED: 501,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}
"""As google.rpc.Code maps them; the rest is 500."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {"ADAPTER_UNKNOWN": "model_not_found"}


class HttpError(Exception):
    """Something that is wrong with the HTTP request itself. close: the connection is of no more
    use, as what was sent is not read to its end."""

    def __init__(self, status: int, message: str, *, code: str, close: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.close = close


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Of whatever was raised: the status, the body and the headers."""
    if isinstance(error, HttpError):
        headers = {"connection": "close"} if error.close else {}
        return error.status, _body(error.status, str(error), code=error.code), headers
    code, status = to_status(error)
    found: dict[type[Message], Any] = {}
    for detail in status.details:
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
        ):
            message = kind()
            if detail.Unpack(message):
                found[kind] = message
    number = STATUSES.get(code, 500)
    reason = found[error_details_pb2.ErrorInfo].reason
    bad = found.get(error_details_pb2.BadRequest)
    param = bad.field_violations[0].field if bad else None
    name = _CODES.get(reason, reason.lower())
    retry = found.get(error_details_pb2.RetryInfo)
    headers = {} if retry is None else _retry(retry.retry_delay.ToNanoseconds() / 1e9)
    return number, _body(number, status.message, param=param, code=name), headers


def response(error: Exception) -> JSONResponse:
    """What is answered instead."""
    status, body, headers = describe(error)
    return JSONResponse(body, status, headers)


def plain(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """For paths and methods that there are not."""
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(status, "http_error")
    return JSONResponse(_body(status, message, code=code), status, headers)


def _retry(seconds: float) -> dict[str, str]:
    """In whole seconds, as HTTP has it, and in milliseconds, which OpenAI's clients prefer."""
    return {
        "retry-after": str(math.ceil(seconds)),
        "retry-after-ms": str(math.ceil(seconds * 1000)),
    }


def _body(status: int, message: str, *, param: str | None = None, code: str) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
