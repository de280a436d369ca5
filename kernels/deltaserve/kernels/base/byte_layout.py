"""The order that native/int8.c and native/bytes.c read weights of a byte in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LANES = 16


def pack(q: Tensor) -> Tensor:
    """int8 [out, in] -> [blocks, in, 16]; rows padded to 16."""
    padded = F.pad(q, (0, 0, 0, -q.shape[0] % LANES))
    return padded.view(-1, LANES, q.shape[1]).transpose(1, 2).contiguous()


def unpack(blocks: Tensor, out_features: int) -> Tensor:
    """The [out, in] that `pack` was given."""
    return blocks.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()
