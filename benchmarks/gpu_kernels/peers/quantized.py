"""One int4 weight for every peer that takes one: unsigned values, a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_kernels.data import DEVICE, DTYPE
from gpu_kernels.shapes import QUANTIZED_GROUP, Group


@dataclass(frozen=True)
class Int4:
    """``weight[n, k] = (values[n, k] - zeros[n, k // 128]) * scales[n, k // 128]``. values: uint8
    [out, in] of 0..15; scales and zeros: DTYPE [out, in / 128], zeros whole numbers."""

    values: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def weight(self) -> Tensor:
        """float64 [out, in]."""
        spread = (
            t.double().repeat_interleave(QUANTIZED_GROUP, 1) for t in (self.zeros, self.scales)
        )
        zeros, scales = spread
        return (self.values.double() - zeros) * scales


def random_int4(group: Group) -> Int4:
    shape = (group.out_features, group.in_features)
    blocks = (group.out_features, group.in_features // QUANTIZED_GROUP)
    return Int4(
        torch.randint(0, 16, shape, dtype=torch.uint8, device=DEVICE),
        ((0.5 + torch.rand(blocks, device=DEVICE)) / (5 * group.in_features**0.5)).to(DTYPE),
        torch.randint(6, 10, blocks, device=DEVICE).to(DTYPE),
    )
