"""Whole numbers of a few bits, packed without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 21
"""Values unpacked at a time: bounds the temporaries, which are eight times larger."""


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, count]: each row is a stream of `bits` bits a value, the
    lowest bits of the lowest word first; a value may lie across two words (3 bits)."""
    rows = max(1, BLOCK // max(1, words.shape[1] * 32 // bits))
    found = torch.empty(words.shape[0], count, dtype=torch.uint8)
    for start in range(0, words.shape[0], rows):
        found[start : start + rows] = _unpack(words[start : start + rows], bits)[:, :count]
    return found


def _unpack(words: Tensor, bits: int) -> Tensor:
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (octets.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(1)
    # `bits` bytes are eight values.
    whole = octets.shape[1] // bits * bits
    parts = octets[:, :whole].view(len(octets), -1, bits).long()
    joined = (parts << torch.arange(0, 8 * bits, 8)).sum(-1, keepdim=True)
    values = joined >> torch.arange(0, 8 * bits, bits) & (1 << bits) - 1
    return values.flatten(1).to(torch.uint8)
