"""Code4Linear: weights of 4 bits that stand for one of 16 numbers, with a scale per group."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from deltaserve.kernels.base import int4_layout
from deltaserve.kernels.base.by_rows import by_rows
from deltaserve.kernels.base.linear import BaseLinear, compute_bias, tensor_bytes
from deltaserve.kernels.base.quantize import check_group_size
from deltaserve.kernels.native import library


class Code4Linear(BaseLinear):
    """``w = code[q] * scale``. q: uint8 [out, in], values 0..15; code: [16]; scale: [out, groups],
    both held in float32.

    groups = ceil(in / group_size); the last one is shorter where group_size does not divide in.
    """

    def __init__(
        self,
        q: Tensor,
        code: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        group_size: int,
    ) -> None:
        check_group_size(group_size)
        self.out_features, self.in_features = q.shape
        groups = (self.out_features, -(-self.in_features // group_size))
        if tuple(scale.shape) != groups or tuple(code.shape) != (16,):
            raise ValueError(
                f"scale {tuple(scale.shape)} and code {tuple(code.shape)} must be {groups} and "
                f"(16,): in_features {self.in_features} in groups of {group_size}"
            )
        if not 0 <= int(q.min()) <= int(q.max()) <= 15:
            raise ValueError(f"q has values in {int(q.min())}..{int(q.max())}; it takes 0..15")
        self.dtype = dtype
        self.group_size = group_size
        self.bias = compute_bias(bias, self.out_features, dtype)
        self._words = int4_layout.pack(q)
        self._code = code.float().contiguous()
        self._scale = int4_layout.pack_groups(scale.float())
        self.nbytes = tensor_bytes(self._words, self._code, self._scale, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        lib = library()
        if lib is None:
            return by_rows(x, self._rows, self.bias, self.out_features, self.dtype)
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        failed = lib["ds_code4"](
            x.data_ptr(),
            self.dtype == torch.bfloat16,
            x.shape[0],
            self.in_features,
            y.data_ptr(),
            self.out_features,
            self._words.data_ptr(),
            self._code.data_ptr(),
            self._scale.data_ptr(),
            self.group_size,
            None if self.bias is None else self.bias.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the inputs of a linear of 4-bit codes")
        return y

    def weight(self) -> Tensor:
        return self._rows(0, self.out_features)

    def likeness(self) -> Hashable:
        return "code4", self.dtype, self.in_features, self.group_size, tuple(self._code.tolist())

    def held(self) -> dict[str, Tensor]:
        found = {
            "q": int4_layout.unpack(self._words, self.out_features, self.in_features),
            "code": self._code,
            "scale": int4_layout.unpack_groups(self._scale, self.out_features),
        }
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def _rows(self, start: int, end: int) -> Tensor:
        """float32 [end - start, in]; start: a multiple of 16, the rows of a block."""
        blocks, count = int4_layout.blocks(start, end), end - start
        q = int4_layout.unpack(self._words[blocks], count, self.in_features)
        scale = int4_layout.unpack_groups(self._scale[blocks], count)
        index = torch.arange(self.in_features) // self.group_size
        return self._code[q.int()].mul_(scale[:, index])
