"""Arena: device memory that adapters' blobs lie in, in units of 16 bytes."""

from __future__ import annotations

from bisect import bisect_left, insort

import torch
from torch import Tensor

UNIT = 16
ALIGN = 8
"""Blobs start at multiples of 128 bytes, a cache line."""


class OutOfArena(MemoryError):
    """A blob does not fit in an arena that may not grow."""


class Arena:
    """First-fit allocation with neighbouring free ranges joined. Kernels see it through views of
    several types; offsets are in units of 16 bytes and fit 32 bits up to 32 GiB.

    nbytes: size at first. grows: whether a full arena becomes a larger one, which moves it: graphs
    captured over a growing arena must be captured again.
    """

    def __init__(self, device: torch.device, nbytes: int = 1 << 16, grows: bool = True) -> None:
        self.device = device
        self.grows = grows
        self._data = self._allocate(-(-nbytes // (UNIT * ALIGN)) * ALIGN)
        self._free = [(0, self.units)]  # (start, size), ascending, never adjacent
        self._taken: dict[int, int] = {}

    @property
    def units(self) -> int:
        """Size in units of 16 bytes."""
        return self._data.numel() // UNIT

    @property
    def used(self) -> int:
        """Bytes taken by blobs, rounded up to whole cache lines."""
        return sum(self._taken.values()) * UNIT

    def view(self, dtype: torch.dtype) -> Tensor:
        """The whole arena as a flat tensor of a type."""
        return self._data.view(dtype)

    def put(self, blob: Tensor) -> int:
        """Copies a uint8 blob in; returns its offset in units. Raises OutOfArena."""
        offset = self._take(max(1, -(-blob.numel() // UNIT)))
        self._data[offset * UNIT : offset * UNIT + blob.numel()].copy_(blob, non_blocking=True)
        return offset

    def drop(self, offset: int) -> None:
        """Gives a blob's memory back."""
        start, size = offset, self._taken.pop(offset)
        at = bisect_left(self._free, (start, 0))
        if at < len(self._free) and self._free[at][0] == start + size:
            size += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == start:
            start, before = self._free.pop(at - 1)
            size += before
        insort(self._free, (start, size))

    def _take(self, units: int) -> int:
        units = -(-units // ALIGN) * ALIGN
        for i, (start, size) in enumerate(self._free):
            if size >= units:
                self._free[i : i + 1] = [(start + units, size - units)] if size > units else []
                self._taken[start] = units
                return start
        if not self.grows:
            raise OutOfArena(
                f"{units * UNIT} bytes do not fit in an arena of {self.units * UNIT} of which "
                f"{self.used} are taken"
            )
        self._grow(units)
        return self._take(units)

    def _grow(self, units: int) -> None:
        old, size = self._data, self.units
        self._data = self._allocate(2 * size + units)
        self._data[: old.numel()].copy_(old)
        self._taken[size] = self.units - size
        self.drop(size)

    def _allocate(self, units: int) -> Tensor:
        # Zeros: a masked load may still touch what was never written.
        return torch.zeros(units * UNIT, dtype=torch.uint8, device=self.device)
