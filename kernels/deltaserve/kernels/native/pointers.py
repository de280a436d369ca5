"""Tables of raw pointers that native kernels read: slot -> rows of C structures."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltaserve.kernels.native.library import Entries, Table, library
from deltaserve.kernels.segments import Segments

FORMATS = {"u8": "Q", "i8": "q", "i4": "i", "f4": "f"}
"""Types of numpy's -> of `struct`, which aligns them in the same way."""

_entries: WeakKeyDictionary[Segments, Entries] = WeakKeyDictionary()


def entries(segments: Segments) -> Any:
    """A pointer to the step's `entries_t`; valid while the segments live."""
    found = _entries.get(segments)
    if found is None:
        found = _entries[segments] = Entries(
            len(segments),
            segments.start.ctypes.data,
            segments.end.ctypes.data,
            segments.slot.ctypes.data,
            segments.strength.ctypes.data,
        )
    return ctypes.byref(found)


def add_deltas(name: str, x: Tensor, y: Tensor, segments: Segments, table: PointerTable) -> bool:
    """Calls the native kernel `name`, which adds a step's deltas to y [T, width] in place.

    x: [T, in]; both float32 or bfloat16. Returns False where there are no native kernels.
    """
    lib = library()
    if lib is None:
        return False
    assert x.is_contiguous() and y.is_contiguous() and segments.tokens == x.shape[0] == y.shape[0]
    failed = lib[name](
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        x.shape[1],
        y.data_ptr(),
        y.dtype == torch.bfloat16,
        y.shape[1],
        entries(segments),
        table.address,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the intermediate values of {name}")
    return True


def apply_vectors(
    y: Tensor, segments: Segments, table: PointerTable, *, factor: bool, bias: Tensor | None = None
) -> bool:
    """Adds the table's vectors to y [T, width] in place, or multiplies y by ``1 + sum w (v - 1)``.

    y, bias [width]: float32 or bfloat16; a factor leaves the bias alone. Returns False where there
    are no native kernels.
    """
    lib = library()
    if lib is None:
        return False
    assert y.is_contiguous()
    failed = lib["ds_vectors"](
        y.data_ptr(),
        y.dtype == torch.bfloat16,
        y.shape[1],
        entries(segments),
        table.address,
        None if bias is None else bias.data_ptr(),
        bias is not None and bias.dtype == torch.bfloat16,
        factor,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the runs of ds_vectors")
    return True


class PointerTable:
    """Rows of one C structure, those of a slot side by side. `fields`: the numpy dtype's."""

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self._dtype = np.dtype(list(fields), align=True)
        self._pack = struct.Struct("".join(FORMATS[kind] for _, kind in fields)).pack_into
        self._used = 0
        self._free: dict[int, list[int]] = {}
        self._held: dict[int, tuple[int, int]] = {}  # what `first` and `count` say
        self._first: npt.NDArray[np.int32] = np.zeros(8, np.int32)
        self._count: npt.NDArray[np.int32] = np.zeros(8, np.int32)
        self._rows: npt.NDArray[Any] = np.zeros(8, self._dtype)
        self._table = Table()
        self.address = ctypes.addressof(self._table)
        """Of the `table_t`, which stays where it is as long as this lives."""
        self._locate()

    def put(self, slot: int, rows: Sequence[tuple[Any, ...]]) -> None:
        """Sets the rows of a slot, none to empty it. A few microseconds: the engine thread does it
        for every group of an adapter that comes or goes."""
        held = self._held.pop(slot, None)
        if held is not None:
            self._count[slot] = 0
            self._free.setdefault(held[1], []).append(held[0])
        if not rows:
            return
        count, size = len(rows), self._dtype.itemsize
        if slot >= len(self._count):
            more = np.zeros(max(slot + 1, 2 * len(self._count)) - len(self._count), np.int32)
            self._first = np.concatenate((self._first, more))
            self._count = np.concatenate((self._count, more))
            self._locate()
        free = self._free.get(count)
        if free:
            first = free.pop()
        else:
            if self._used + count > len(self._rows):
                self._make_room(count)
            first, self._used = self._used, self._used + count
        at = first * size
        for row in rows:
            self._pack(self._bytes, at, *row)
            at += size
        self._held[slot] = first, count
        self._first[slot], self._count[slot] = first, count

    def _make_room(self, more: int) -> None:
        """Drops the rows of emptied slots, in an array twice as large as what is left."""
        kept = {slot: self._rows[at : at + count] for slot, (at, count) in self._held.items()}
        needed = sum(map(len, kept.values())) + more
        self._rows = np.zeros(max(8, 2 * needed), self._dtype)
        self._used = 0
        self._free.clear()
        for slot, rows in kept.items():
            self._rows[self._used : self._used + len(rows)] = rows
            self._first[slot] = self._used
            self._held[slot] = self._used, len(rows)
            self._used += len(rows)
        self._locate()

    def _locate(self) -> None:
        self._bytes = self._rows.view(np.uint8).data
        self._table.items = self._rows.ctypes.data
        self._table.first = self._first.ctypes.data
        self._table.count = self._count.ctypes.data
        self._table.slots = len(self._count)
