"""ForwardContext: what the replaced modules and the attention function must know of one step.

One object per engine, set as attribute `ctx` on every module that reads it; the engine fills it
before each forward pass, so nothing is threaded through the signatures of the modeling code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from deltaserve.kernels.attention.step import AttentionStep
from deltaserve.kernels.backend import Backend
from deltaserve.kernels.segments import EMPTY, Segments

if TYPE_CHECKING:
    from deltaserve.server.model.probe import LayerAttention


class KVStore:
    """Keys and values of every attention layer, in cells of one token each.

    keys[layer], values[layer]: in the compute dtype, [blocks * block_size, kv_heads, head_dim]
    where the backend's memory comes by the page; else [blocks, block_size, kv_heads, head_dim] at
    any distance between blocks.
    """

    def __init__(
        self, keys: dict[int, Tensor], values: dict[int, Tensor], block_size: int, blocks: int
    ) -> None:
        self.keys = keys
        self.values = values
        self.block_size = block_size
        self.blocks = blocks

    @classmethod
    def zeros(
        cls,
        layers: Iterable[LayerAttention],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        backend: Backend,
    ) -> Self:
        """One in memory of its own."""
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        rows = (blocks * block_size,) if backend.returns_pages else (blocks, block_size)
        for la in layers:
            for held, dim in ((keys, la.key_dim), (values, la.value_dim)):
                shape = (*rows, la.kv_heads, dim)
                held[la.layer_idx] = torch.zeros(shape, dtype=dtype, device=backend.device)
        return cls(keys, values, block_size, blocks)

    def index(self, held: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
        """What to index a layer's keys or values with. cells: int64 [n]."""
        if held.dim() == 3:
            return (cells,)
        return cells // self.block_size, cells % self.block_size


class ForwardContext:
    """backend: what computes. segments: of all tokens of the step. logit_segments: of the rows
    lm_head sees. embedding_override: (rows int64 [k], values [k, hidden]): embedding outputs to be
    overwritten, the virtual tokens of prompt-tuned adapters. attention, kv: set by the runner.
    gated_prefixes: of the installed adapters."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.segments: Segments = EMPTY
        self.logit_segments: Segments = EMPTY
        self.embedding_override: tuple[Tensor, Tensor] | None = None
        self.attention: AttentionStep | None = None
        self.kv: KVStore | None = None
        self.gated_prefixes = backend.gated_prefixes()
