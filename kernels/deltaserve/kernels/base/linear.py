"""BaseLinear: what every kind of base linear offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

import torch
from torch import Tensor

from deltaserve.kernels.native.stack import NativeLinear

COMPUTE_DTYPES = (torch.float32, torch.bfloat16)


class BaseLinear(ABC):
    """``y = x W^T + b`` for x [T, in] of dtype `dtype`; y [T, out] is new and of the same dtype.

    bias: of dtype `dtype`, or None. nbytes: exact bytes held, padding and bias included.
    rounds_inputs: whether it quantizes x, and so turns the smallest difference of two into one of
    a 127th of their largest number.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    nbytes: int
    dtype: torch.dtype
    rounds_inputs: bool = False

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in]. Returns [T, out]."""

    def set_bias(self, bias: Tensor) -> None:
        """Gives a linear that has none a bias [out]."""
        self.bias = compute_bias(bias, self.out_features, self.dtype)
        self.nbytes += tensor_bytes(self.bias)

    def native(self) -> NativeLinear | None:
        """Itself as native code calls it, until its bias is set anew; None if that cannot be."""
        return None

    @abstractmethod
    def weight(self) -> Tensor:
        """float32 [out, in], dequantized, as served. A new tensor, safe from any thread."""

    def weight_rows(self, start: int, end: int) -> Tensor:
        """float32 [end - start, in]: of `weight`, those rows."""
        return self.weight()[start:end]

    def likeness(self) -> Hashable:
        """Linears of equal likeness are held alike: `concat` can make one of them."""
        return id(self)

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """The canonical tensors, whatever the layout in memory; fingerprints are made of them."""


def compute_bias(bias: Tensor | None, out_features: int, dtype: torch.dtype) -> Tensor | None:
    """The bias in the compute dtype, checked against out_features."""
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype is {dtype}; a base linear computes in float32 or bfloat16")
    if bias is None:
        return None
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight needs ({out_features},)")
    return bias.to(dtype).contiguous()


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of plain (not oneDNN-packed) tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
