"""LowRank on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.native import library
from deltaserve.kernels.native.pointers import PointerTable, add_deltas
from deltaserve.kernels.primitives import LowRank
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group, Table

# lowrank_item of native/lowrank.c
ITEM = (
    ("a", "u8"),
    ("b", "u8"),
    ("column", "i8"),
    ("rank", "i4"),
    ("out", "i4"),
    ("scale", "f4"),
    ("bf16", "i4"),
)


@dataclass(frozen=True, eq=False, slots=True)
class PackedLowRank:
    """a: [r, in] and b: [r, out], rank-major both, so that either is read front to back."""

    part: int
    a: Tensor
    b: Tensor
    scale: float

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b)


def pack(part: int, primitive: LowRank, dtype: torch.dtype) -> PackedLowRank:
    """Casts to the serving dtype; bfloat16 files stay so, which is exact, even in float32."""
    keep = torch.bfloat16 if primitive.a.dtype == primitive.b.dtype == torch.bfloat16 else dtype
    a = cast(primitive.a, keep)
    b = cast(primitive.b, keep, transpose=True)
    return PackedLowRank(part, a, b, float(primitive.scale))


class LowRankTable(Table[PackedLowRank]):
    """One native call serves every entry of the step, every part and any mix of ranks."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.pointers = PointerTable(ITEM)

    @property
    def rounds_once(self) -> bool:
        return library() is not None

    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out] in place, in float32 inside. x: [T, in]."""
        if not add_deltas("ds_lowrank", x, y, segments, self.pointers):
            self._add_torch(x, y, segments)

    def _add_torch(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        for tokens, strength, item in self.entries(segments):
            h = x[tokens].float() @ item.a.float().T
            h.mul_(item.scale * strength)
            y[tokens, self.columns[item.part]] += h @ item.b.float()

    def _changed(self, slot: int) -> None:
        rows = [self._row(item) for item in self.items.get(slot, ())]
        self.pointers.put(slot, rows)

    def _row(self, item: PackedLowRank) -> tuple[float, ...]:
        a, b = item.a, item.b
        rank, out = b.shape
        column = self.columns[item.part].start
        return a.data_ptr(), b.data_ptr(), column, rank, out, item.scale, a.dtype == torch.bfloat16
