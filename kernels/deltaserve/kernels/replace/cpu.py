"""Replace and ReplaceRows of linears on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.base import onednn
from deltaserve.kernels.cast import cast
from deltaserve.kernels.primitives import Replace, ReplaceRows
from deltaserve.kernels.table import Table


@dataclass(frozen=True, eq=False, slots=True)
class PackedReplace:
    """weight: the replacing rows [n, in], packed; index: int64 [n], or None for all rows."""

    part: int
    weight: Tensor
    index: Tensor | None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.index is None else (self.weight, self.index)


def pack(part: int, primitive: Replace | ReplaceRows, dtype: torch.dtype) -> PackedReplace:
    if isinstance(primitive, Replace):
        return PackedReplace(part, onednn.pack(cast(primitive.weight, dtype)), None)
    weight = onednn.pack(cast(primitive.values, dtype))
    return PackedReplace(part, weight, cast(primitive.index, torch.int64))


class ReplaceTable(Table[PackedReplace]):
    def apply(
        self, x: Tensor, y: Tensor, plain: Tensor, bias: Tensor | None, entry: tuple[int, float]
    ) -> None:
        """y[t, out] += w (W' - W) x for one run and one adapter, float32, in place.

        x: [t, in]; plain: ``W x + bias`` of the run; entry: (slot, strength).
        """
        slot, strength = entry
        for item in self.items.get(slot, ()):
            columns = self.columns[item.part]
            own = None if bias is None else bias[columns]
            base = plain[:, columns]
            if item.index is not None:
                own = None if own is None else own[item.index]
                base = base[:, item.index]
            product = onednn.linear(x, item.weight, own).float()
            delta = (product - base).mul_(strength)
            if item.index is None:
                y[:, columns] += delta
            else:
                y[:, columns].index_add_(1, item.index, delta)

    def overwrite(self, x: Tensor, y: Tensor, bias: Tensor | None, slot: int) -> None:
        """y[t, out] := ``W' x + bias`` for one run of one adapter at strength 1, in place."""
        for item in self.items.get(slot, ()):
            columns = self.columns[item.part]
            own = None if bias is None else bias[columns]
            if item.index is None:
                y[:, columns] = onednn.linear(x, item.weight, own).to(y.dtype)
            else:
                own = None if own is None else own[item.index]
                y[:, columns][:, item.index] = onednn.linear(x, item.weight, own).to(y.dtype)
