"""KVPool: the memory of the cache's blocks, which grows and shrinks behind fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from deltaserve.kernels.pages import PAGE, Pages, whole_pages
from deltaserve.server.engine.kv_memory import BlockMemory
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.model.context import KVStore
from deltaserve.server.model.probe import LayerAttention

LINE = 128
"""Bytes to which a block's layers are aligned where they lie side by side."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What blocks take. block: bytes of one, all layers together. extent: blocks that come and go
    together: by the page, the fewest whose keys and whose values are whole pages in every layer;
    else one, whose layers lie side by side."""

    block_size: int
    block: int
    extent: int

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerAttention],
        block_size: int,
        dtype: torch.dtype,
        *,
        by_page: bool = True,
    ) -> Self:
        """block_size: tokens. by_page: whether the backend's memory comes like that."""
        sides = sides_of(layers, block_size, dtype)
        if not by_page:
            return cls(block_size, sum(map(whole_lines, sides)), 1)
        return cls(block_size, sum(sides), math.lcm(*(PAGE // math.gcd(PAGE, n) for n in sides)))

    @property
    def token(self) -> int:
        """Bytes that the cache takes per token, all layers together."""
        return self.block // self.block_size

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens of a sequence."""
        return -(-tokens // self.block_size)

    def fitting(self, nbytes: int) -> int:
        """Blocks that can be handed out of so much memory."""
        return max(0, nbytes // (self.extent * self.block) * self.extent - 1)

    def bytes(self, blocks: int) -> int:
        """Memory of so many, and of the one that pads tables, in whole extents."""
        return -(-(blocks + 1) // self.extent) * self.extent * self.block


def sides_of(layers: Iterable[LayerAttention], block_size: int, dtype: torch.dtype) -> list[int]:
    """Bytes of a block's keys and of its values in each layer, in turn."""
    widths = [la.kv_heads * dim for la in layers for dim in (la.key_dim, la.value_dim)]
    return [block_size * n * dtype.itemsize for n in widths]


def whole_lines(nbytes: int) -> int:
    """`nbytes`, rounded up to whole cache lines."""
    return -(-nbytes // LINE) * LINE


class KVPool:
    """Address space for `blocks` zeroed blocks of every layer, none of which takes memory before
    something is written to it. store: what attention reads."""

    def __init__(
        self,
        layers: Iterable[LayerAttention],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        ledger: Ledger,
    ) -> None:
        layers = list(layers)
        cells = blocks * block_size
        extent = KVShape.of(layers, block_size, dtype).extent
        sides = [(la, dim) for la in layers for dim in (la.key_dim, la.value_dim)]
        row = [la.kv_heads * dim * dtype.itemsize for la, dim in sides]
        starts = [0]
        for nbytes in row:
            starts.append(starts[-1] + whole_pages(cells * nbytes))
        self._pages = Pages(starts[-1])
        tensors: list[Tensor] = [
            self._pages.tensor(start, (cells, la.kv_heads, dim), dtype)
            for start, (la, dim) in zip(starts[:-1], sides, strict=True)
        ]
        keys = {la.layer_idx: t for la, t in zip(layers, tensors[::2], strict=True)}
        values = {la.layer_idx: t for la, t in zip(layers, tensors[1::2], strict=True)}
        self.store = KVStore(keys, values, block_size, blocks)
        self._spans = [
            (start, extent * block_size * nbytes, whole_pages(cells * nbytes))
            for start, nbytes in zip(starts[:-1], row, strict=True)
        ]
        extent_bytes = sum(size for _, size, _ in self._spans)
        self.memory = BlockMemory(ledger, extent, extent_bytes, self._drop)

    def _drop(self, extent: int) -> None:
        for start, size, end in self._spans:
            first = extent * size
            self._pages.drop(start + first, start + min(first + size, end))
