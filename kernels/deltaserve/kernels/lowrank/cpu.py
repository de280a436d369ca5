"""LowRank on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.primitives import LowRank
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Table


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
    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out], float32, in place. x: [T, in]."""
        for tokens, strength, item in self.entries(segments):
            h = x[tokens].float() @ item.a.float().T
            h.mul_(item.scale * strength)
            y[tokens, self.group.columns(item.part)] += h @ item.b.float()
