"""The order of sign bits that the Triton kernel reads: base/words.py's, one bit a weight.

A word holds one lane's share of 128 columns: pair j = 2 s + half of slice s has its even column at
bit 15 - j and its odd one at bit 31 - j, so one shift brings a pair to the two sign bits of a
packed word. A set bit means -1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.base.words import ALIGN

ROWS = 64
"""Rows are padded to a multiple of this, the kernel's tile: its loads need no mask."""


def pack_signs(signs: Tensor, in_features: int) -> Tensor:
    """uint8 [p, out, ceil(in / 8)], bit j of byte k for input 8 k + j, 1 means +1 (the layout of
    `Bit`) -> int32 [p, in / 128, out, 4], out padded to 64 and in to 128."""
    return torch.stack([_pack(plane, in_features) for plane in signs])


def _pack(plane: Tensor, in_features: int) -> Tensor:
    out, nbytes = plane.shape
    width = -(-in_features // ALIGN) * ALIGN
    padded = F.pad(plane, (0, width // 8 - nbytes, 0, -out % ROWS))
    bits = np.unpackbits(padded.numpy(), axis=1, bitorder="little")
    negative = 1 - bits.reshape(len(padded), width // ALIGN, 8, 2, 4, 2)  # n c s half L e
    # Bit 15 - j + 16 e, j = 2 s + half: from the highest bit down, e then s then half.
    lanes = negative.transpose(1, 0, 4, 5, 2, 3)  # c n L e s half
    downward = lanes[:, :, :, ::-1].reshape(width // ALIGN, len(padded), 4, 32)
    words = np.packbits(downward, axis=-1, bitorder="big").view(">u4")[..., 0]
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))
