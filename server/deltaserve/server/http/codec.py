"""The two forms that Connect has for messages: proto3's JSON, and protobuf's own bytes."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from typing import Any, TypeVar

from google.protobuf import any_pb2, json_format
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from deltaserve.server.errors import InvalidRequest
from deltaserve.server.http.body import too_large

JSON, PROTO = "json", "proto"
_LARGE = 64 << 10
"""Bytes of a message; a larger one is written on another thread."""
_HEAD = struct.Struct(">BI")
_COMPRESSED, _END = 0b01, 0b10
_GZIP = zlib.MAX_WBITS | 16

Request = TypeVar("Request", bound=Message)


def decode(data: bytes, kind: type[Request], form: str) -> Request:
    """Raises InvalidRequest or DecodeError."""
    if form == PROTO:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            raise DecodeError(f"the request's bytes are not a valid message: {error}") from None
    try:
        return json_format.Parse(data.decode() or "{}", kind())
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except (ValueError, json_format.ParseError) as error:
        raise InvalidRequest(f"the body is no {kind.DESCRIPTOR.name}: {error}") from None


async def encode(message: Message, form: str) -> bytes:
    """Fields with their default values are written too, in JSON, for readers without our types."""
    if form == PROTO:
        return message.SerializeToString()
    if message.ByteSize() > _LARGE:
        return await asyncio.to_thread(_to_json, message)
    return _to_json(message)


def _to_json(message: Message) -> bytes:
    found = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    return dump(found)


def dump(data: object) -> bytes:
    """Compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def error(code: StatusCode, status: status_pb2.Status) -> dict[str, Any]:
    """https://connectrpc.com/docs/protocol#error-end-stream"""
    spelled = "canceled" if code is StatusCode.CANCELLED else code.name.lower()
    return {
        "code": spelled,
        "message": status.message,
        "details": [_detail(detail) for detail in status.details],
    }


def _detail(packed: any_pb2.Any) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "type": packed.TypeName(),
        "value": base64.b64encode(packed.value).decode().rstrip("="),
    }
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
    ):
        message = kind()
        if packed.Unpack(message):
            shown["debug"] = json_format.MessageToDict(message)
    return shown


def envelope(data: bytes, *, end: bool = False) -> bytes:
    """One message of a stream. end: it is the last one, which is JSON in either form."""
    return _HEAD.pack(_END if end else 0, len(data)) + data


def unzipped(data: bytes, most: int) -> bytes:
    """Out of gzip. most: bytes. Raises InvalidRequest, HttpError."""
    unzip = zlib.decompressobj(_GZIP)
    try:
        found = unzip.decompress(data, most + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the message is said to be in gzip and is not: {error}") from None
    if len(found) > most:
        raise too_large(most)
    if not unzip.eof or unzip.unused_data:
        raise InvalidRequest("the message in gzip is cut off, or not one")
    return found


def opened(data: bytes, *, gzip: bool, most: int) -> bytes:
    """The one message that the client of a server's stream sends. gzip: it may be compressed so,
    and is then at most so many bytes. Raises InvalidRequest, HttpError."""
    if len(data) < _HEAD.size:
        raise InvalidRequest(f"the body is {len(data)} bytes; it must be one enveloped message")
    flags, size = _HEAD.unpack_from(data)
    compressed = flags == _COMPRESSED and gzip
    if (flags and not compressed) or size != len(data) - _HEAD.size:
        raise InvalidRequest(
            f"the body's envelope has flags {flags} and says {size} bytes, and there are "
            f"{len(data) - _HEAD.size}; it must be one message, with flags 0, or 1 if it is "
            "compressed as connect-content-encoding says"
        )
    message = data[_HEAD.size :]
    return unzipped(message, most) if compressed else message
