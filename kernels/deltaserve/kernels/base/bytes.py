"""ByteLinear: a byte a weight, whole numbers or 8-bit floats, with a scale per group of inputs."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from deltaserve.kernels.base import byte_layout
from deltaserve.kernels.base.by_rows import by_rows
from deltaserve.kernels.base.int4_layout import pack_groups, unpack_groups
from deltaserve.kernels.base.linear import BaseLinear, compute_bias, tensor_bytes
from deltaserve.kernels.native import library

KINDS = {torch.int8: 0, torch.float8_e4m3fn: 1}
"""dtype of q -> what native/bytes.c calls it."""


class ByteLinear(BaseLinear):
    """``w = (q - zero) * scale``. q: int8 or float8_e4m3fn [out, in]; scale and zero: [out, groups]
    of any float dtype, held in float32; zero None: all 0.

    groups = ceil(in / group_size), group_size any number from 1 to in; the last one is shorter
    where group_size does not divide in. One scale a row is one group.
    """

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        group_size: int,
    ) -> None:
        self.out_features, self.in_features = q.shape
        if q.dtype not in KINDS:
            raise ValueError(f"q is {q.dtype}; it must be int8 or float8_e4m3fn")
        if not 0 < group_size <= self.in_features:
            raise ValueError(f"group_size is {group_size}; it must be in 1..{self.in_features}")
        groups = (self.out_features, -(-self.in_features // group_size))
        for name, given in (("scale", scale), ("zero", zero)):
            if given is not None and tuple(given.shape) != groups:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}; it must be {groups}: in_features "
                    f"{self.in_features} in groups of {group_size}"
                )
        if q.dtype == torch.float8_e4m3fn and bool((q.view(torch.uint8) & 0x7F == 0x7F).any()):
            raise ValueError("q has values that are not numbers")
        self.dtype = dtype
        self.kind = q.dtype
        self.group_size = group_size
        self.bias = compute_bias(bias, self.out_features, dtype)
        self._scale = pack_groups(scale.float())
        self._zero = None if zero is None else pack_groups(zero.float())
        # In blocks of 16 rows, [block, in, 16], as native/bytes.c reads it; or as it is.
        self._blocked = library() is not None
        self._q = (
            byte_layout.pack(q.view(torch.int8))
            if self._blocked
            else q.view(torch.int8).contiguous()
        )
        self.nbytes = tensor_bytes(self._q, self._scale, self._zero, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return (
            self._native(x.contiguous())
            if self._blocked
            else by_rows(x, self._rows, self.bias, self.out_features, self.dtype)
        )

    def weight(self) -> Tensor:
        return self._rows(0, self.out_features)

    def likeness(self) -> Hashable:
        kind = self.kind, self._zero is None, self.group_size
        return "bytes", self.dtype, self.in_features, *kind

    def held(self) -> dict[str, Tensor]:
        found = {"q": self._canonical(), "scale": unpack_groups(self._scale, self.out_features)}
        if self._zero is not None:
            found["zero"] = unpack_groups(self._zero, self.out_features)
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def _canonical(self) -> Tensor:
        q = self._q
        if self._blocked:
            q = byte_layout.unpack(q, self.out_features)
        return q.view(self.kind)

    def _rows(self, start: int, end: int) -> Tensor:
        """float32 [end - start, in]."""
        rows = slice(start, end)
        index = torch.arange(self.in_features) // self.group_size
        w = self._canonical()[rows].float()
        if self._zero is not None:
            w -= unpack_groups(self._zero, self.out_features)[rows][:, index]
        return w.mul_(unpack_groups(self._scale, self.out_features)[rows][:, index])

    def _native(self, x: Tensor) -> Tensor:
        lib = library()
        assert lib is not None
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        failed = lib["ds_bytes"](
            x.data_ptr(),
            self.dtype == torch.bfloat16,
            x.shape[0],
            self.in_features,
            y.data_ptr(),
            self.out_features,
            self._q.data_ptr(),
            KINDS[self.kind],
            self._scale.data_ptr(),
            None if self._zero is None else self._zero.data_ptr(),
            self.group_size,
            None if self.bias is None else self.bias.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the inputs of a linear of bytes")
        return y
