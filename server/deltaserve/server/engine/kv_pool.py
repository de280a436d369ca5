"""KVPool: the memory of the cache's blocks, which grows and shrinks behind fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from deltaserve.kernels.backend import CacheMemory
from deltaserve.kernels.pages import PAGE, Pages, whole_pages
from deltaserve.server.engine.kv_cache import BlockMemory
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.model.context import KVStore
from deltaserve.server.model.probe import LayerAttention


@dataclass(frozen=True, slots=True)
class KVShape:
    """What blocks take. block: bytes of one, all layers together. extent: the fewest blocks whose
    keys and whose values are whole pages in every layer."""

    block_size: int
    block: int
    extent: int

    @classmethod
    def of(cls, layers: Iterable[LayerAttention], block_size: int, dtype: torch.dtype) -> Self:
        """block_size: tokens."""
        sides = [la.kv_heads * dim for la in layers for dim in (la.key_dim, la.value_dim)]
        row = [block_size * n * dtype.itemsize for n in sides]
        return cls(block_size, sum(row), math.lcm(*(PAGE // math.gcd(PAGE, n) for n in row)))

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


class KVPool:
    """Address space for `blocks` zeroed blocks of every layer, none of which takes memory before
    something is written to it, where the backend's memory is like that. store: what attention
    reads. cache: makes the memory."""

    def __init__(
        self,
        layers: Iterable[LayerAttention],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        ledger: Ledger,
        cache: Callable[[int], CacheMemory] = Pages,
    ) -> None:
        layers = list(layers)
        cells = blocks * block_size
        extent = KVShape.of(layers, block_size, dtype).extent
        sides = [(la, dim) for la in layers for dim in (la.key_dim, la.value_dim)]
        row = [la.kv_heads * dim * dtype.itemsize for la, dim in sides]
        starts = [0]
        for nbytes in row:
            starts.append(starts[-1] + whole_pages(cells * nbytes))
        self._pages = cache(starts[-1])
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
