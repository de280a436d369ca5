"""Int8Linear: int8 weights with one scale per output row."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from deltaserve.kernels.base import byte_layout
from deltaserve.kernels.base.by_rows import by_rows
from deltaserve.kernels.base.linear import BaseLinear, compute_bias, tensor_bytes
from deltaserve.kernels.base.w8a8 import W8A8
from deltaserve.kernels.native import library
from deltaserve.kernels.native.stack import KINDS, NativeLinear, pointer


class Int8Linear(BaseLinear):
    """``w = q * scale``. q: int8 [out, in]; scale: float32 [out].

    activations "float": inputs as they are. "int8": each token is quantized to 8 bits with a
    scale of its own (abs-max / 127) and multiplied in integers; faster from a few tokens on, but
    the error of the inputs, about 0.5 % of a typical value, is the operator's choice. It needs
    oneDNN's int8 kernels (VNNI) and raises ValueError without.
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
        self.rounds_inputs = activations == "int8"
        self.bias = compute_bias(bias, self.out_features, dtype)
        self._scale = scale.float().contiguous()
        self._w8a8 = W8A8(q, self._scale) if activations == "int8" else None
        self._blocked = self._w8a8 is None and library() is not None
        # In blocks of 16 rows, [block, in, 16], as native/int8.c reads it; or as it is.
        self._q = torch.empty(0, dtype=torch.int8)
        if self._w8a8 is None:
            self._q = byte_layout.pack(q) if self._blocked else q.contiguous()
        held = 0 if self._w8a8 is None else self._w8a8.nbytes
        self.nbytes = held + tensor_bytes(self._q, self._scale, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self._w8a8 is not None:
            return self._w8a8(x, self.bias, self.dtype)
        if self._blocked:
            return self._native(x.contiguous())
        return by_rows(x, self._rows, self.bias, self.out_features, self.dtype)

    def native(self) -> NativeLinear | None:
        held = self._q if self._w8a8 is None else self._w8a8.native()
        if library() is None or held is None:
            return None
        return NativeLinear(
            KINDS["int8", self.activations],
            False,
            self.in_features,
            self.out_features,
            0,
            pointer(held),
            pointer(self._scale),
            None,
            pointer(self.bias),
        )

    def weight(self) -> Tensor:
        return self._canonical().float() * self._scale[:, None]

    def likeness(self) -> Hashable:
        return "int8", self.dtype, self.in_features, self.activations

    def held(self) -> dict[str, Tensor]:
        found = {"q": self._canonical(), "scale": self._scale}
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def _canonical(self) -> Tensor:
        if self._w8a8 is not None:
            return self._w8a8.weight()
        if self._blocked:
            return byte_layout.unpack(self._q, self.out_features)
        return self._q

    def _native(self, x: Tensor) -> Tensor:
        lib = library()
        assert lib is not None
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        failed = lib["ds_int8"](
            x.data_ptr(),
            self.dtype == torch.bfloat16,
            x.shape[0],
            self.in_features,
            y.data_ptr(),
            self.out_features,
            self._q.data_ptr(),
            self._scale.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the inputs of an int8 linear")
        return y

    def _rows(self, start: int, end: int) -> Tensor:
        """float32 [end - start, in]; where the weight is not packed."""
        return self._q[start:end].float() * self._scale[start:end, None]
