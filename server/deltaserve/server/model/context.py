"""ForwardContext: what the replaced modules and the attention function must know of one step.

One object per engine, set as attribute `ctx` on every module that reads it; the engine fills it
before each forward pass, so nothing is threaded through the signatures of the modeling code.
"""

from __future__ import annotations

from torch import Tensor

from deltaserve.kernels.attention.step import AttentionStep
from deltaserve.kernels.backend import Backend
from deltaserve.kernels.primitives import GatedPrefix
from deltaserve.kernels.segments import EMPTY, Segments


class KVStore:
    """Keys and values of every attention layer, in cells of one token each.

    keys[layer], values[layer]: [blocks * block_size, kv_heads, head_dim] in the compute dtype.
    """

    def __init__(
        self, keys: dict[int, Tensor], values: dict[int, Tensor], block_size: int, blocks: int
    ) -> None:
        self.keys = keys
        self.values = values
        self.block_size = block_size
        self.blocks = blocks

    @property
    def nbytes(self) -> int:
        held = [*self.keys.values(), *self.values.values()]
        return sum(t.numel() * t.element_size() for t in held)


class ForwardContext:
    """backend: what computes. segments: of all tokens of the step. logit_segments: of the rows
    lm_head sees. embedding_override: (rows int64 [k], values [k, hidden]): embedding outputs to be
    overwritten, the virtual tokens of prompt-tuned adapters. attention, kv: set by the runner.
    gated_prefixes: of the installed adapters, by slot. Its tensors are on the backend's device."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.segments: Segments = EMPTY
        self.logit_segments: Segments = EMPTY
        self.embedding_override: tuple[Tensor, Tensor] | None = None
        self.attention: AttentionStep | None = None
        self.kv: KVStore | None = None
        self.gated_prefixes: dict[int, GatedPrefix] = {}
