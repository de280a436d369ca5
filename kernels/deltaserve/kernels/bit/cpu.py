"""Bit on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.primitives import Bit, unpack_signs
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Table

# Rows unpacked at a time: 256 rows of 2048 float32 signs are 2 MiB.
BLOCK_ROWS = 256


@dataclass(frozen=True, eq=False, slots=True)
class PackedBit:
    """signs: uint8 [p, out, ceil(in / 8)]; scale: float32 [p, out]."""

    part: int
    signs: Tensor
    scale: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.signs, self.scale)


def pack(part: int, primitive: Bit) -> PackedBit:
    return PackedBit(part, primitive.signs.contiguous(), cast(primitive.scale, torch.float32))


class BitTable(Table[PackedBit]):
    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out], float32, in place. x: [T, in]."""
        for tokens, strength, item in self.entries(segments):
            run = x[tokens].float()
            out = y[tokens, self.group.columns(item.part)]
            for plane, scale in zip(item.signs, item.scale, strict=True):
                for start in range(0, plane.shape[0], BLOCK_ROWS):
                    rows = slice(start, start + BLOCK_ROWS)
                    signs = unpack_signs(plane[rows], self.group.in_features)
                    out[:, rows] += F.linear(run, signs) * (scale[rows] * strength)
