"""Int4Linear: 4-bit weights with a scale and a zero per group of inputs."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from deltaserve.kernels.base import int4_layout
from deltaserve.kernels.base.by_rows import by_rows
from deltaserve.kernels.base.linear import BaseLinear, compute_bias, tensor_bytes
from deltaserve.kernels.base.quantize import INT4_GROUP, check_group_size, dequantize
from deltaserve.kernels.base.w8a8 import round_tokens
from deltaserve.kernels.native import library
from deltaserve.kernels.native.stack import KINDS, NativeLinear, pointer


class Int4Linear(BaseLinear):
    """``w = (q - zero) * scale``. q: uint8 [out, in], values 0..15; scale, zero: [out, groups].

    groups = ceil(in / group_size); the last one is shorter where group_size does not divide in.
    activations: as of `Int8Linear`.
    """

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        group_size: int = INT4_GROUP,
        activations: str = "float",
    ) -> None:
        check_group_size(group_size)
        self.out_features, self.in_features = q.shape
        groups = (self.out_features, -(-self.in_features // group_size))
        if tuple(scale.shape) != groups or tuple(zero.shape) != groups:
            raise ValueError(
                f"scale {tuple(scale.shape)} and zero {tuple(zero.shape)} must both be {groups}: "
                f"in_features {self.in_features} in groups of {group_size}"
            )
        if not 0 <= int(q.min()) <= int(q.max()) <= 15:
            raise ValueError(f"q has values in {int(q.min())}..{int(q.max())}; int4 takes 0..15")
        self.dtype = dtype
        self.group_size = group_size
        self.activations = activations
        self.rounds_inputs = activations == "int8"
        self.bias = compute_bias(bias, self.out_features, dtype)
        self._words = int4_layout.pack(q)
        keep = torch.bfloat16 if _exact_in_bf16(scale) and _exact_in_bf16(zero) else torch.float32
        self._scale = int4_layout.pack_groups(scale.to(keep))
        self._zero = int4_layout.pack_groups(zero.to(keep))
        self.nbytes = tensor_bytes(self._words, self._scale, self._zero, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        lib = library()
        if lib is None:
            given = x if self.activations == "float" else _rounded(x)
            return by_rows(given, self._rows, self.bias, self.out_features, self.dtype)
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        failed = lib["ds_int4" if self.activations == "float" else "ds_w4a8"](
            x.data_ptr(),
            self.dtype == torch.bfloat16,
            x.shape[0],
            self.in_features,
            y.data_ptr(),
            self.out_features,
            self._words.data_ptr(),
            self._scale.data_ptr(),
            self._zero.data_ptr(),
            self._scale.dtype == torch.bfloat16,
            self.group_size,
            None if self.bias is None else self.bias.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the inputs of an int4 linear")
        return y

    def native(self) -> NativeLinear | None:
        if library() is None:
            return None
        return NativeLinear(
            KINDS["int4", self.activations],
            self._scale.dtype == torch.bfloat16,
            self.in_features,
            self.out_features,
            self.group_size,
            pointer(self._words),
            pointer(self._scale),
            pointer(self._zero),
            pointer(self.bias),
        )

    def weight(self) -> Tensor:
        return self._rows(0, self.out_features)

    def likeness(self) -> Hashable:
        return "int4", self.dtype, self.in_features, self.group_size, self.activations

    def held(self) -> dict[str, Tensor]:
        found = {
            "q": int4_layout.unpack(self._words, self.out_features, self.in_features),
            "scale": int4_layout.unpack_groups(self._scale, self.out_features).float(),
            "zero": int4_layout.unpack_groups(self._zero, self.out_features).float(),
        }
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def _rows(self, start: int, end: int) -> Tensor:
        """float32 [end - start, in]; start: a multiple of 16, the rows of a block."""
        blocks, count = int4_layout.blocks(start, end), end - start
        q = int4_layout.unpack(self._words[blocks], count, self.in_features)
        scale = int4_layout.unpack_groups(self._scale[blocks], count)
        zero = int4_layout.unpack_groups(self._zero[blocks], count)
        return dequantize(q, scale, zero, self.group_size)


def _rounded(x: Tensor) -> Tensor:
    """float32 x as 8 bits a token hold it."""
    q, scale = round_tokens(x)
    return q * scale[:, None]


def _exact_in_bf16(values: Tensor) -> bool:
    return torch.equal(values.bfloat16().double(), values.double())
