"""Int8Linear: int8 weights with one scale per output row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.base.linear import BaseLinear, compute_bias, tensor_bytes

# Rows dequantized at a time for many tokens: 256 rows of 2048 float32 inputs are 2 MiB.
BLOCK_ROWS = 256


class Int8Linear(BaseLinear):
    """``w = q * scale``. q: int8 [out, in]; scale: float32 [out].

    activations "float": inputs as they are. "int8": each token is quantized to 8 bits with a
    scale of its own (abs-max / 127) and multiplied in integers; faster from a few tokens on, but
    the error of the inputs, about 0.5 % of a typical value, is the operator's choice.
    """

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activations: str = "float",
    ) -> None:
        self.out_features, self.in_features = q.shape
        if q.dtype != torch.int8 or tuple(scale.shape) != (self.out_features,):
            raise ValueError(
                f"q is {q.dtype} {tuple(q.shape)} and scale {tuple(scale.shape)}; "
                "they must be int8 [out, in] and [out]"
            )
        self.dtype = dtype
        self.activations = activations
        self.bias = compute_bias(bias, self.out_features, dtype)
        self._q = q.contiguous()
        self._scale = scale.float().contiguous()
        self.nbytes = tensor_bytes(self._q, self._scale, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._blocks(x)

    def weight(self) -> Tensor:
        return self._q.float() * self._scale[:, None]

    def held(self) -> dict[str, Tensor]:
        found = {"q": self._q, "scale": self._scale}
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def _blocks(self, x: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        for start in range(0, self.out_features, BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            w = (self._q[rows].float() * self._scale[rows, None]).to(self.dtype)
            bias = None if self.bias is None else self.bias[rows]
            y[:, rows] = F.linear(x, w, bias)
        return y
