"""Memory that is asked for in full and taken page by page: the keys and values of a cache that
grows and shrinks behind addresses that stay."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def whole_pages(nbytes: int) -> int:
    """`nbytes`, rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class Pages:
    """`nbytes` of private zeros. A page takes memory from the first write to it until it is
    dropped; then it reads as zeros again."""

    def __init__(self, nbytes: int) -> None:
        size = max(whole_pages(nbytes), PAGE)
        if sys.platform == "linux":
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # taken whole for their first byte
        else:
            self._map = mmap.mmap(-1, size)

    def tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The bytes from `start` on, without copying them."""
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(*shape)

    def drop(self, start: int, end: int) -> None:
        """Zero the bytes [start, end), multiples of the page, and give their memory back (which
        is done on Linux alone)."""
        if sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        else:
            self._map[start:end] = bytes(end - start)
