"""Bit on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.bit import layout
from deltaserve.kernels.cast import cast
from deltaserve.kernels.native import library
from deltaserve.kernels.native.pointers import PointerTable, add_deltas
from deltaserve.kernels.primitives import Bit, unpack_signs
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group, Table

# bit_item of native/bit.c
ITEM = (("signs", "u8"), ("scale", "u8"), ("column", "i8"), ("planes", "i4"), ("out", "i4"))

# Rows unpacked at a time without native kernels: 256 rows of 2048 float32 signs are 2 MiB.
BLOCK_ROWS = 256


@dataclass(frozen=True, eq=False, slots=True)
class PackedBit:
    """signs: as lowered, or in the native kernel's layout; scale: float32 [p, out], out rounded up
    to 16 for the native kernel."""

    part: int
    signs: Tensor
    scale: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.signs, self.scale)


def pack(bits: Sequence[tuple[int, Bit]]) -> tuple[PackedBit, ...]:
    """(part, primitive) pairs of one adapter; several on one part become planes of one."""
    packed: list[PackedBit] = []
    for part in sorted({part for part, _ in bits}):
        own = [bit for p, bit in bits if p == part]
        signs = own[0].signs if len(own) == 1 else torch.cat([bit.signs for bit in own])
        scale = own[0].scale if len(own) == 1 else torch.cat([bit.scale for bit in own])
        scale = cast(scale, torch.float32)
        if library() is None:
            packed.append(PackedBit(part, signs.contiguous(), scale))
        else:
            pad = -scale.shape[1] % layout.LANES
            packed.append(PackedBit(part, layout.pack(signs), F.pad(scale, (0, pad)).contiguous()))
    return tuple(packed)


class BitTable(Table[PackedBit]):
    """One native call serves every entry of the step and every part."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.pointers = PointerTable(ITEM)

    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out], float32, in place. x: [T, in]."""
        if not add_deltas("ds_bit", x, y, segments, self.pointers):
            self._add_torch(x, y, segments)

    def _add_torch(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        for tokens, strength, item in self.entries(segments):
            run = x[tokens].float()
            out = y[tokens, self.columns[item.part]]
            for plane, scale in zip(item.signs, item.scale, strict=True):
                for start in range(0, plane.shape[0], BLOCK_ROWS):
                    rows = slice(start, start + BLOCK_ROWS)
                    signs = unpack_signs(plane[rows], self.group.in_features)
                    out[:, rows] += F.linear(run, signs) * (scale[rows] * strength)

    def _changed(self, slot: int) -> None:
        rows = [self._row(item) for item in self.items.get(slot, ())]
        self.pointers.put(slot, rows)

    def _row(self, item: PackedBit) -> tuple[int, ...]:
        planes, out = item.scale.shape[0], self.group.out_features[item.part]
        column = self.columns[item.part].start
        return item.signs.data_ptr(), item.scale.data_ptr(), column, planes, out
