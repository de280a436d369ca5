"""BlockPool: the cache's blocks, at the low end of the one allocation that adapters share.

All layers of a block lie side by side, so that a block is one piece of memory, which can be moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from deltaserve.kernels.backend import SharedMemory
from deltaserve.server.engine.kv_memory import BlockMemory, Moves
from deltaserve.server.engine.kv_pool import KVShape, sides_of, whole_lines
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.model.context import KVStore
from deltaserve.server.model.probe import LayerAttention


class BlockPool:
    """A `kv_memory.Boundary` of up to `blocks` blocks at the low end of `memory`. store: what
    attention reads; of what is above the boundary nobody may."""

    def __init__(
        self,
        layers: Iterable[LayerAttention],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        ledger: Ledger,
        memory: SharedMemory,
    ) -> None:
        layers = list(layers)
        shape = KVShape.of(layers, block_size, dtype, by_page=False)
        self._shared = memory
        self._blocks = memory.data[: blocks * shape.block].view(blocks, shape.block)
        numbers = self._blocks.view(dtype)
        starts = accumulate(map(whole_lines, sides_of(layers, block_size, dtype)), initial=0)

        def side(la: LayerAttention, dim: int) -> Tensor:
            width, at = block_size * la.kv_heads * dim, next(starts) // dtype.itemsize
            return numbers[:, at : at + width].view(-1, block_size, la.kv_heads, dim)

        sides = {la.layer_idx: (side(la, la.key_dim), side(la, la.value_dim)) for la in layers}
        keys, values = ({i: pair[n] for i, pair in sides.items()} for n in (0, 1))
        self.store = KVStore(keys, values, block_size, blocks)
        self.memory = BlockMemory(ledger, 1, shape.block, boundary=self)

    @property
    def reach(self) -> int:
        """See `Boundary`."""
        return self._shared.reach // self.memory.extent_bytes

    def extend(self, blocks: int) -> bool:
        """See `Boundary`."""
        before, size = self._shared.boundary, self.memory.extent_bytes
        if not self._shared.divide(blocks * size):
            return False
        self._blocks[before // size : blocks] = 0
        return True

    def shrink(self, blocks: int, moves: Moves) -> None:
        """See `Boundary`. One copy of a whole block each, in the order of the steps."""
        for source, target in moves:
            self._blocks[target] = self._blocks[source]
        divided = self._shared.divide(blocks * self.memory.extent_bytes)
        assert divided, "what is above a boundary is never in the way of a lower one"

    def check(self, blocks: int) -> None:
        """See `Boundary`."""
        if self._shared.boundary != blocks * self.memory.extent_bytes:
            raise AssertionError(f"{blocks} blocks below {self._shared.boundary}")
        self._shared.check_integrity()
