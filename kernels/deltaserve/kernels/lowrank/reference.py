"""What LowRank means, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from deltaserve.kernels.primitives import LowRank


def delta(primitive: LowRank, x: Tensor) -> Tensor:
    """x: [T, in]. Returns the delta [T, out] in x's dtype, which should be float32 or float64."""
    a, b = primitive.a.to(x.dtype), primitive.b.to(x.dtype)
    return (x @ a.T) @ b.T * primitive.scale
