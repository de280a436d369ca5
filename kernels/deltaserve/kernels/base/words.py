"""The order of quantized weights that the Triton kernels read.

A matrix instruction of 16 columns gives lane L of a quad the columns 2 L, 2 L + 1 (its lower pair)
and 8 + 2 L, 9 + 2 L (its upper one). A word holds what one lane needs, so that unpacking it leaves
every weight in the register that the instruction reads, without a shuffle or shared memory:

    4 bit   [in / 32, out, 4]   nibble 4 e + 2 s + half   of slice s (16 columns), pair half
    8 bit   [in / 16, out, 4]   byte   2 e + half

with e the column's place in its pair: pairs lie 16 bits apart, as packed arithmetic wants them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGN = 128
"""Columns are padded to a multiple of this: the deepest step of any kernel."""


def pack_nibbles(q: Tensor) -> Tensor:
    """uint8 [out, in] of 0..15 -> int32 [in / 32, out, 4], inputs padded to 128."""
    q = _padded(q)
    out, inner = q.shape
    lanes = q.reshape(out, inner // 32, 2, 2, 4, 2).permute(1, 0, 4, 5, 2, 3)  # c n L e s half
    nibbles = lanes.reshape(inner // 32, out, 4, 8)
    low, high = nibbles[..., 0::2], nibbles[..., 1::2]
    return (low | (high << 4)).contiguous().view(torch.int32).squeeze(-1)


def unpack_nibbles(words: Tensor, in_features: int) -> Tensor:
    """The uint8 [out, in] that `pack_nibbles` was given."""
    chunks, out, _ = words.shape
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack((octets & 15, octets >> 4), -1).reshape(chunks, out, 4, 2, 2, 2)
    q = nibbles.permute(1, 0, 4, 5, 2, 3).reshape(out, chunks * 32)
    return q[:, :in_features].contiguous()


def pack_bytes(q: Tensor) -> Tensor:
    """uint8 [out, in] -> int32 [in / 16, out, 4], inputs padded to 128."""
    q = _padded(q)
    out, inner = q.shape
    lanes = q.reshape(out, inner // 16, 2, 4, 2).permute(1, 0, 3, 4, 2)  # c n L e half
    return lanes.reshape(inner // 16, out, 4, 4).contiguous().view(torch.int32).squeeze(-1)


def unpack_bytes(words: Tensor, in_features: int) -> Tensor:
    """The uint8 [out, in] that `pack_bytes` was given."""
    chunks, out, _ = words.shape
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8).reshape(chunks, out, 4, 2, 2)
    q = octets.permute(1, 0, 4, 2, 3).reshape(out, chunks * 16)
    return q[:, :in_features].contiguous()


def _padded(q: Tensor) -> Tensor:
    return F.pad(q, (0, -q.shape[1] % ALIGN))
