"""The order of sign bits that the Triton kernel reads: base/words.py's, one bit a weight.

A word holds one lane's share of 128 columns, a pair of columns in the same bit of its two halves.
The kernel turns a bit into a number where it lies: over a base number, one bit of a float adds 2 to
it, if it is the right bit. So a pair costs one instruction, and a shift serves four pairs:

    bf16 bit  15: 1 or -1    14: 0 or 2     6: 4 or 6      5: 8 or 10
    f16 bit   15: 1 or -1    14: 0 or 2     9: 4 or 6      8: 8 or 10

All are a constant plus or minus 1; what the constants add up to, a number per token, is taken away
at the end. PLACES gives each pair its shift and its bit; OFFSETS that bit's constant.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.base.words import ALIGN

ROWS = 128
"""Rows are padded to a multiple of this, the kernel's tile: its loads need no mask."""

# (shift left, bit) of pair 2 s + half: slice s of 16 columns, pair half of it (base/words.py).
PLACES = {
    torch.bfloat16: (
        *((0, 15), (0, 14), (0, 6), (0, 5), (2, 15), (2, 14), (2, 6), (2, 5)),
        *((4, 15), (4, 14), (4, 6), (4, 5), (6, 15), (6, 14), (6, 6), (8, 15)),
    ),
    torch.float16: (
        *((0, 15), (0, 14), (0, 9), (0, 8), (2, 15), (2, 14), (2, 9), (2, 8)),
        *((4, 15), (4, 14), (4, 9), (4, 8), (6, 9), (6, 8), (8, 9), (8, 8)),
    ),
}
OFFSETS = {15: 0.0, 14: 1.0, 6: 5.0, 9: 5.0, 5: 9.0, 8: 9.0}


def places(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Those of an activation's dtype: float32 is served by float16's."""
    return PLACES[torch.bfloat16 if dtype == torch.bfloat16 else torch.float16]


def offsets(dtype: torch.dtype) -> Tensor:
    """float32 [128]: the constant that each column's bits come with."""
    by_pair = torch.tensor([OFFSETS[bit] for _, bit in places(dtype)])
    return by_pair[torch.arange(ALIGN) // 8]


def pack_signs(signs: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """uint8 [p, out, ceil(in / 8)], bit j of byte k for input 8 k + j, 1 means +1 (the layout of
    `Bit`) -> int32 [p, in / 128, out, 4], out padded to 128 and in to 128."""
    return torch.stack([_pack(plane, in_features, dtype) for plane in signs])


def _pack(plane: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    out, nbytes = plane.shape
    width = -(-in_features // ALIGN) * ALIGN
    padded = F.pad(plane, (0, width // 8 - nbytes, 0, -out % ROWS))
    units = padded.contiguous().numpy().view("<u2").reshape(len(padded), width // ALIGN, 8)
    words = np.empty((width // ALIGN, len(padded), 2), dtype=np.uint64)
    table = _table(dtype)
    for start in range(0, len(padded), ROWS):  # what is between stays in the processor's cache
        rows = slice(start, start + ROWS)
        index = units[rows].transpose(2, 1, 0).astype(np.intp)
        for side in range(2):
            found = table[0, side][index[0]]
            for k in range(1, 8):
                found |= table[k, side][index[k]]
            words[:, rows, side] = found
    return torch.from_numpy(words.view(np.int32))


@cache
def _table(dtype: torch.dtype) -> npt.NDArray[np.uint64]:
    """[8, 2, 65536]: what the k-th 16 columns of 128 have in the first two and in the last two of
    their four words, by those columns' signs."""
    byte = np.arange(256, dtype=np.uint32)
    each = np.empty((16, 256, 4), dtype=np.uint32)
    for j, (shift, bit) in enumerate(places(dtype)):
        for lane in range(4):
            pair = byte >> np.uint32(2 * lane)
            pair = ~pair if bit == 15 else pair
            each[j, :, lane] = ((pair & 1) | (pair & 2) << np.uint32(15)) << np.uint32(bit - shift)
    both = each[1::2, :, None] | each[::2, None]  # by the higher byte, then the lower
    sides = both.reshape(8, 1 << 16, 4).view(np.uint64)
    return np.ascontiguousarray(sides.transpose(0, 2, 1))
