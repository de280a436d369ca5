"""What Replace and ReplaceRows mean, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from deltaserve.kernels.primitives import Replace, ReplaceRows


def replaced(primitive: Replace | ReplaceRows, weight: Tensor) -> Tensor:
    """The adapter's whole weight, in the dtype of the base's `weight`."""
    if isinstance(primitive, Replace):
        return primitive.weight.to(weight.dtype)
    result = weight.clone()
    result[primitive.index] = primitive.values.to(weight.dtype)
    return result
