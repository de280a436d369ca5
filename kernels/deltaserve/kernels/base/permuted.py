"""PermutedLinear: a linear whose weight is held with its inputs in another order."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from deltaserve.kernels.base.linear import BaseLinear, tensor_bytes


class PermutedLinear(BaseLinear):
    """``y = inner(x[:, order])``: column i of the inner weight is column ``order[i]`` here.

    GPTQ with activation order puts columns that lie apart into one group; held in the order of
    their groups they are neighbours again. order: int64 [in], each column once.
    """

    def __init__(self, inner: BaseLinear, order: Tensor) -> None:
        if tuple(order.shape) != (inner.in_features,):
            raise ValueError(f"order has shape {tuple(order.shape)}; it needs {inner.in_features}")
        if not torch.equal(order.sort().values, torch.arange(inner.in_features)):
            raise ValueError("order does not have each input once")
        self.inner = inner
        self.order = order.contiguous()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.dtype = inner.dtype
        self._take()

    def _take(self) -> None:
        self.bias = self.inner.bias
        self.nbytes = self.inner.nbytes + tensor_bytes(self.order)

    def set_bias(self, bias: Tensor) -> None:
        self.inner.set_bias(bias)
        self._take()

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x.index_select(1, self.order))

    def weight(self) -> Tensor:
        return self.inner.weight()[:, self.order.argsort()]

    def likeness(self) -> Hashable:
        return "permuted", self.inner.likeness(), self.order.numpy().tobytes()

    def held(self) -> dict[str, Tensor]:
        return {**self.inner.held(), "order": self.order}
