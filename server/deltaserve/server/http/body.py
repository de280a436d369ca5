"""Bodies: bytes -> the fields of a request. What is wrong is refused by the field's name."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from deltaserve.server.errors import Cancelled, InvalidRequest
from deltaserve.server.http.errors import HttpError

BODY_SECONDS = 60.0
"""For all of a body to arrive."""
_SHOWN = 64

Fields = TypeVar("Fields", bound=BaseModel)


async def fields(request: Request, kind: type[Fields], most: int) -> Fields:
    """The body as an object of this kind. most: bytes of it. Raises HttpError, InvalidRequest."""
    given = request.headers.get("content-type", "")
    media = given.partition(";")[0].strip().lower()
    if media != "application/json":
        # also keeps web pages of other origins out, which may send other types without asking
        text = f"content-type: {given[:_SHOWN]!r} is not possible; it must be application/json"
        raise HttpError(415, text, code="unsupported_media_type")
    return parsed(await read(request, most), kind)


async def read(request: Request, most: int) -> bytes:
    """The whole body. most: bytes of it. Raises HttpError, Cancelled."""
    data = bytearray()
    announced = request.headers.get("content-length", "")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if announced.isdecimal() and int(announced) > most:
                raise too_large(most)
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large(most)
    except TimeoutError:
        text = f"the body did not arrive within {BODY_SECONDS:g} s"
        raise HttpError(408, text, code="request_timeout", close=True) from None
    except ClientDisconnect:
        raise Cancelled("the client went away") from None
    return bytes(data)


def too_large(most: int) -> HttpError:
    """most: bytes."""
    text = f"the body is larger than {most} bytes, the most that is taken"
    return HttpError(413, text, code="request_too_large")


def parsed(data: bytes, kind: type[Fields]) -> Fields:
    """JSON, as UTF-8 and without NaN, as an object of this kind. Raises InvalidRequest."""
    try:
        found = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"the body is {shown(found)}; it must be a JSON object")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        what = first["msg"][:1].lower() + first["msg"][1:]
        if first["type"] == "missing":
            raise InvalidRequest(f"{field}: it is missing", field=field) from None
        text = f"{field}: {shown(first['input'])} is not possible; {what}"
        raise InvalidRequest(text, field=field) from None


def shown(value: object) -> str:
    """The beginning of it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
