"""DenseLinear: float32 or bfloat16 weights, prepacked for oneDNN."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from deltaserve.kernels.base import onednn
from deltaserve.kernels.base.linear import BaseLinear, compute_bias, tensor_bytes


class DenseLinear(BaseLinear):
    """weight: [out, in] of any float dtype, cast to `dtype` (float32 or bfloat16)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.bias = compute_bias(bias, self.out_features, dtype)
        self._packed = onednn.pack(weight.detach().to(dtype))
        self.nbytes = onednn.nbytes(self._packed) + tensor_bytes(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self._packed, self.bias)

    def weight(self) -> Tensor:
        return self._canonical().float()

    def likeness(self) -> Hashable:
        return "dense", self.dtype, self.in_features

    def held(self) -> dict[str, Tensor]:
        found = {"weight": self._canonical()}
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def _canonical(self) -> Tensor:
        return onednn.unpack(self._packed)
