"""JSON from strangers: capped in size and nesting, no duplicate keys, no NaN."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from deltaserve.adapters.errors import MalformedAdapter
from deltaserve.adapters.plain_file import open_plain

MAX_BYTES = 16 << 20
"""Large enough for the index of a checkpoint of 100,000 tensors."""

MAX_DEPTH = 32


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:100]!r} appears twice")
    return found


def _depth(data: bytes) -> int:
    """Nesting depth, estimated at one glance: brackets inside strings count too. What slips
    through meets the parser's own recursion limit, which is caught as well."""
    codes = np.frombuffer(data, dtype=np.uint8)
    opened = (codes == ord("[")) | (codes == ord("{"))
    closed = (codes == ord("]")) | (codes == ord("}"))
    level = np.cumsum(opened.astype(np.int32) - closed.astype(np.int32))
    return int(level.max(initial=0))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``; `MalformedAdapter` naming ``where`` if it is anything else."""
    if _depth(data) > MAX_DEPTH:
        raise MalformedAdapter(f"{where}: JSON nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise MalformedAdapter(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedAdapter(f"{where}: a JSON object is needed, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most `MAX_BYTES`."""
    with open(open_plain(path), "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MalformedAdapter(f"{path}: JSON larger than {MAX_BYTES} bytes")
    return parse_object(data, str(path))
