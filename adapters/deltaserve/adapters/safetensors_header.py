"""The safetensors header, checked before a byte of a tensor is read.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length N, N
bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then one buffer that the tensors cover
without gap or overlap. The library accepts a valid header of up to 100 MB, which takes seconds
and hundreds of megabytes to list; ours must fit the caps below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from deltaserve.adapters.errors import MalformedAdapter, UnsupportedAdapter
from deltaserve.adapters.json_file import parse_object

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_NAME = 1000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

BASE_DTYPES = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn}
"""What a base may hold: its quantized weights come with scales, which an adapter's would lack."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` counts from the start of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(
    fd: int, where: str, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """Entries by tensor name, and the file's own metadata, of an open safetensors file. dtypes: by
    the names that headers have for them; others are refused."""
    size = os.fstat(fd).st_size
    if size < 8:
        raise MalformedAdapter(f"{where}: {size} bytes is too short for a safetensors file")
    begin = os.pread(fd, 9, 0)
    _refuse_pickle(begin, where)
    length = int.from_bytes(begin[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedAdapter(
            f"{where}: header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
        )
    if 8 + length > size:
        raise MalformedAdapter(
            f"{where}: truncated: header of {length} bytes in a file of {size} bytes"
        )
    raw = parse_object(os.pread(fd, length, 8), f"{where} (header)")
    metadata = raw.pop("__metadata__", {})
    if len(raw) > MAX_TENSORS:
        raise MalformedAdapter(f"{where}: {len(raw)} tensors; at most {MAX_TENSORS} are read")
    start = 8 + length
    entries = {name: _entry(name, value, start, where, dtypes) for name, value in raw.items()}
    _check_cover(entries, start, size, where)
    return entries, metadata if isinstance(metadata, dict) else {}


def _refuse_pickle(start: bytes, where: str) -> None:
    """The first nine bytes. A header of 0x0380 bytes begins like a pickle, but opens a brace."""
    if start[8:] == b"{":
        return
    if start[:4] == b"PK\x03\x04" or (start[0] == 0x80 and start[1] in (2, 3, 4, 5)):
        raise MalformedAdapter(
            f"{where}: a pickle or zip archive, which can run code; store it as safetensors"
        )


def _entry(
    name: str, value: Any, base: int, where: str, dtypes: Mapping[str, torch.dtype]
) -> TensorEntry:
    def bad(what: str) -> MalformedAdapter:
        return MalformedAdapter(f"{where}: tensor {name[:200]!r}: {what}", field=name[:200])

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("needs exactly dtype, shape and data_offsets")
    if len(name) > MAX_NAME:
        raise bad(f"name of {len(name)} characters; at most {MAX_NAME} are read")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad(f"shape must be at most {MAX_DIMENSIONS} integers >= 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("data_offsets must be two integers, begin <= end")
    if not isinstance(value["dtype"], str) or value["dtype"] not in dtypes:
        raise UnsupportedAdapter(
            f"{where}: tensor {name[:200]!r}: dtype {str(value['dtype'])[:40]!r} is not read; "
            f"known: {', '.join(dtypes)}",
            field=name[:200],
        )
    dtype = dtypes[value["dtype"]]
    nbytes = prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise bad(f"{nbytes} bytes by its shape, {offsets[1] - offsets[0]} by its offsets")
    return TensorEntry(dtype, tuple(shape), base + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _check_cover(entries: dict[str, TensorEntry], start: int, size: int, where: str) -> None:
    at = start
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].offset, e[1].nbytes)):
        if entry.offset != at:
            how = "overlaps the one before" if entry.offset < at else "leaves a gap before it"
            raise MalformedAdapter(f"{where}: tensor {name[:200]!r} {how}", field=name[:200])
        at += entry.nbytes
    if at != size:
        how = "truncated" if at > size else "bytes that belong to no tensor"
        raise MalformedAdapter(f"{where}: {how}: tensors end at byte {at}, the file at {size}")
