"""Int4Linear: 4-bit weights with a scale and a zero per group of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.base.linear import BaseLinear, compute_bias, tensor_bytes
from deltaserve.kernels.base.quantize import INT4_GROUP, check_group_size, dequantize

BLOCK_ROWS = 256


class Int4Linear(BaseLinear):
    """``w = (q - zero) * scale``. q: uint8 [out, in], values 0..15; scale, zero: [out, groups].

    groups = ceil(in / group_size); the last one is shorter where group_size does not divide in.
    """

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        group_size: int = INT4_GROUP,
    ) -> None:
        check_group_size(group_size)
        self.out_features, self.in_features = q.shape
        groups = (self.out_features, -(-self.in_features // group_size))
        if tuple(scale.shape) != groups or tuple(zero.shape) != groups:
            raise ValueError(
                f"scale {tuple(scale.shape)} and zero {tuple(zero.shape)} must both be {groups}: "
                f"in_features {self.in_features} in groups of {group_size}"
            )
        self.dtype = dtype
        self.group_size = group_size
        self.bias = compute_bias(bias, self.out_features, dtype)
        padded = F.pad(q, (0, q.shape[1] % 2))
        self._packed = (padded[:, ::2] | (padded[:, 1::2] << 4)).contiguous()
        self._scale = scale.float().contiguous()
        self._zero = zero.float().contiguous()
        self.nbytes = tensor_bytes(self._packed, self._scale, self._zero, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        for start in range(0, self.out_features, BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            w = dequantize(self._q(rows), self._scale[rows], self._zero[rows], self.group_size)
            bias = None if self.bias is None else self.bias[rows]
            y[:, rows] = F.linear(x, w.to(self.dtype), bias)
        return y

    def weight(self) -> Tensor:
        return dequantize(self._q(slice(None)), self._scale, self._zero, self.group_size)

    def held(self) -> dict[str, Tensor]:
        found = {"q": self._q(slice(None)), "scale": self._scale, "zero": self._zero}
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def _q(self, rows: slice) -> Tensor:
        packed = self._packed[rows]
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, : self.in_features]
