"""GatedLowRank on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.primitives import GatedLowRank
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Table


@dataclass(frozen=True, eq=False, slots=True)
class PackedGated:
    """inner: [n + n r, in], the router above the experts' A, so that x is read once; b:
    [out, n r]."""

    part: int
    experts: int
    inner: Tensor
    b: Tensor
    scale: float

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.inner, self.b)


def pack(part: int, primitive: GatedLowRank, dtype: torch.dtype) -> PackedGated:
    """Casts to the serving dtype."""
    inner = torch.cat([cast(primitive.gate, dtype), cast(primitive.a, dtype)])
    experts = len(primitive.gate)
    return PackedGated(part, experts, inner, cast(primitive.b, dtype), float(primitive.scale))


class GatedTable(Table[PackedGated]):
    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out], float32, in place. x: [T, in]."""
        for tokens, strength, item in self.entries(segments):
            both = F.linear(x[tokens], item.inner)
            gate = torch.softmax(both[:, : item.experts].float(), -1)
            hidden = both[:, item.experts :].float().reshape(len(both), item.experts, -1)
            hidden = (hidden * gate[:, :, None]).flatten(1).to(x.dtype)
            delta = F.linear(hidden, item.b).float()
            y[tokens, self.columns[item.part]] += delta * (item.scale * strength)
