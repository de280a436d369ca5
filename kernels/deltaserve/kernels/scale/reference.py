"""What Scale and Bias mean, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.kernels.primitives import Bias, Primitive, Scale


def factors(
    mix: Sequence[tuple[Sequence[Primitive], float]], in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:
    """(input [in], output [out]) float64 factors of the base product under (primitives, strength)
    pairs: ``1 + sum of w (s - 1)``."""
    inputs = torch.ones(in_features, dtype=torch.float64)
    outputs = torch.ones(out_features, dtype=torch.float64)
    for primitives, strength in mix:
        for p in primitives:
            if isinstance(p, Scale) and p.input is not None:
                inputs += strength * (p.input.double() - 1)
            if isinstance(p, Scale) and p.output is not None:
                outputs += strength * (p.output.double() - 1)
    return inputs, outputs


def bias(mix: Sequence[tuple[Sequence[Primitive], float]], out_features: int) -> Tensor:
    """float64 [out]: the sum of ``w bias``."""
    total = torch.zeros(out_features, dtype=torch.float64)
    for primitives, strength in mix:
        for p in primitives:
            if isinstance(p, Bias):
                total += strength * p.bias.double()
    return total
