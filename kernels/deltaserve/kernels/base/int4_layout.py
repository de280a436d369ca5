"""The orders that native/int4.c reads 4-bit weights, scales and zeros in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
WORD = 8
# Nibble j of a word is this input of its 8: neighbours are 4 nibbles apart.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(q: Tensor) -> Tensor:
    """uint8 [out, in] -> int32 [blocks, words, 16]; rows padded to 16, inputs to 8."""
    padded = F.pad(q, (0, -q.shape[1] % WORD, 0, -q.shape[0] % LANES))
    nibbles = padded.view(-1, LANES, padded.shape[1] // WORD, WORD)[..., list(ORDER)]
    low, high = nibbles[..., ::2], nibbles[..., 1::2]
    words = (low | (high << 4)).contiguous().view(torch.int32).squeeze(-1)
    return words.transpose(1, 2).contiguous()


def unpack(words: Tensor, out_features: int, in_features: int) -> Tensor:
    """The uint8 [out, in] that `pack` was given."""
    octets = words.transpose(1, 2).contiguous().unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack((octets & 15, octets >> 4), -1).flatten(3)
    back = torch.tensor(ORDER).argsort()
    rows = nibbles[..., back].flatten(2).flatten(0, 1)
    return rows[:out_features, :in_features].contiguous()


def pack_groups(values: Tensor) -> Tensor:
    """[out, groups] -> [blocks, groups, 16]; rows padded to 16."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % LANES))
    return padded.view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(values: Tensor, out_features: int) -> Tensor:
    """The [out, groups] that `pack_groups` was given."""
    return values.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()


def blocks(start: int, end: int) -> slice:
    """The blocks that hold rows [start, end); start begins one."""
    return slice(start // LANES, -(-end // LANES))
