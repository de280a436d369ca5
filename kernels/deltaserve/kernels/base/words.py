"""The order of quantized weights that the Triton kernels read.

A matrix instruction of 16 columns gives lane L of a quad the columns 2 L, 2 L + 1 (its lower pair)
and 8 + 2 L, 9 + 2 L (its upper one). A word holds what one lane needs, so that unpacking it leaves
every weight in the register that the instruction reads, without a shuffle or shared memory:

    4 bit   [in / 32, out, 4]   nibble 4 e + 2 s + half   of slice s (16 columns), pair half
    8 bit   [in / 16, out, 4]   byte   2 e + half

with e the column's place in its pair: pairs lie 16 bits apart, as packed arithmetic wants them.

An instruction on bytes has 32 columns, and lane L has 4 L to 4 L + 3 of each half of them:

    4 bit   [in / 32, out, 4]   nibble 2 b + s            of byte b, half s
    8 bit   [in / 16, out, 16]  bytes, one after the other
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


def pack_half_bytes(q: Tensor) -> Tensor:
    """uint8 [out, in] of 0..15 -> int32 [in / 32, out, 4], inputs padded to 128, for products of
    bytes."""
    q = _padded(q)
    halves = q.reshape(len(q), -1, 2, 16).transpose(0, 1)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).contiguous().view(torch.int32)


def unpack_half_bytes(words: Tensor, in_features: int) -> Tensor:
    """The uint8 [out, in] that `pack_half_bytes` was given."""
    octets = words.contiguous().view(torch.uint8)
    halves = torch.stack((octets & 15, octets >> 4), 2)
    return halves.transpose(0, 1).flatten(1)[:, :in_features].contiguous()


def pack_whole_bytes(q: Tensor) -> Tensor:
    """int8 [out, in] -> int8 [in / 16, out, 16], inputs padded to 128, for products of bytes."""
    return _padded(q).reshape(len(q), -1, 16).transpose(0, 1).contiguous()


def unpack_whole_bytes(octets: Tensor, in_features: int) -> Tensor:
    """The int8 [out, in] that `pack_whole_bytes` was given."""
    return octets.transpose(0, 1).flatten(1)[:, :in_features].contiguous()


def _padded(q: Tensor) -> Tensor:
    return F.pad(q, (0, -q.shape[1] % ALIGN))
