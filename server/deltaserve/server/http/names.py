"""The names that fields have on the wire of gRPC -> those that the client gave them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from deltaserve.server.errors import RequestError

_NAMES = {
    "stop.strings": "stop",
    "stop.token_ids": "stop_token_ids",
    "chat.tools_json": "tools",
    "chat.variables_json": "chat_template_kwargs",
    "text": "prompt",
    "token_ids.ids": "prompt",
    "uri": "lora_path",
    "name": "lora_name",
}
_PREFIXES = ("sampling.", "stop.", "chat.")
NONE: Mapping[str, str] = MappingProxyType({})


def client_name(field: str, own: Mapping[str, str]) -> str:
    """own: what this request calls some of them."""
    for names in (own, _NAMES):
        if field in names:
            return names[field]
    for prefix in _PREFIXES:
        if field.startswith(prefix):
            return field.removeprefix(prefix)
    return field


@contextmanager
def in_client_names(own: Mapping[str, str] = NONE) -> Iterator[None]:
    """Refusals that come out of it name the client's fields."""
    try:
        yield
    except RequestError as error:
        renamed = client_name(error.field, own)
        head, colon, rest = str(error).partition(": ")
        if colon and renamed and " " not in head:
            error.args = (f"{renamed}: {rest}",)
        error.field = renamed
        raise
