"""BlockPool: the cache's blocks, at the low end of the one allocation that adapters share.

All layers of a block lie side by side, so that a block is one piece of memory, which can be moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from deltaserve.server.engine.kv_cache import BlockMemory
from deltaserve.server.engine.kv_pool import KVShape, sides_of, whole_lines
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.model.context import KVStore
from deltaserve.server.model.probe import LayerAttention


class BlockPool:
    """Room for `blocks` blocks. data: uint8, zeros, at least as large. store: what attention
    reads."""

    def __init__(
        self,
        layers: Iterable[LayerAttention],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        ledger: Ledger,
        data: Tensor,
    ) -> None:
        layers = list(layers)
        shape = KVShape.of(layers, block_size, dtype, by_page=False)
        self._blocks = data[: blocks * shape.block].view(blocks, shape.block)
        numbers = self._blocks.view(dtype)
        starts = accumulate(map(whole_lines, sides_of(layers, block_size, dtype)), initial=0)

        def side(la: LayerAttention, dim: int) -> Tensor:
            width, at = block_size * la.kv_heads * dim, next(starts) // dtype.itemsize
            return numbers[:, at : at + width].view(-1, block_size, la.kv_heads, dim)

        sides = {la.layer_idx: (side(la, la.key_dim), side(la, la.value_dim)) for la in layers}
        keys, values = ({i: pair[n] for i, pair in sides.items()} for n in (0, 1))
        self.store = KVStore(keys, values, block_size, blocks)
        self.memory = BlockMemory(ledger, 1, shape.block, self._drop)

    def _drop(self, block: int) -> None:
        self._blocks[block] = 0
