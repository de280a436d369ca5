"""What Bit means, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from deltaserve.kernels.primitives import Bit, unpack_signs


def delta(primitive: Bit, x: Tensor) -> Tensor:
    """x: [T, in]. Returns the delta [T, out] in x's dtype, which should be float32 or float64."""
    signs = unpack_signs(primitive.signs, x.shape[1]).to(x.dtype)
    weight = (primitive.scale.to(x.dtype)[:, :, None] * signs).sum(0)
    return x @ weight.T
