"""W8A8: int8 weights times 8-bit inputs, multiplied in whole numbers: natively, or by oneDNN where
there are no native kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.base import onednn
from deltaserve.kernels.native import library

# Inputs are unsigned with this zero: a signed input falls to oneDNN's reference code, 100x slower.
INPUT_ZERO = 128
TOKENS_HINT = 16
LANES, QUAD = 16, 4


class W8A8:
    """q: int8 [out, in]; scale: float32 [out], kept by the caller for as long as this lives.

    A token's inputs become ``q * scale`` with scale = max |x| / 127.
    """

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.out_features, self.in_features = q.shape
        self._scale = scale
        self._native = library() is not None
        if self._native:
            self._packed = _pack(q)
            self.nbytes = self._packed.numel()
            return
        if not torch.cpu._is_vnni_supported():
            raise ValueError('activations "int8" needs a C compiler or VNNI; use "float"')
        self._packed = torch.ops.onednn.qlinear_prepack(q.contiguous(), [TOKENS_HINT, q.shape[1]])
        self._zeros = torch.zeros(len(scale), dtype=torch.int64)
        self.nbytes = onednn.nbytes(self._packed) + onednn.nbytes(self._zeros)

    def __call__(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x: [T, in] of `dtype`, float32 or bfloat16. Returns [T, out] of `dtype`."""
        if not self._native:
            return self._onednn(x, bias, dtype)
        lib = library()
        assert lib is not None
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features, dtype=dtype)
        failed = lib["ds_w8a8"](
            x.data_ptr(),
            dtype == torch.bfloat16,
            x.shape[0],
            self.in_features,
            y.data_ptr(),
            self.out_features,
            self._packed.data_ptr(),
            self._scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the inputs of an int8 linear")
        return y

    def native(self) -> Tensor | None:
        """The weights as native/w8a8.c reads them."""
        return self._packed if self._native else None

    def weight(self) -> Tensor:
        """q [out, in] again, bit for bit."""
        if self._native:
            return _unpack(self._packed, self.out_features, self.in_features)
        return onednn.unpack(self._packed).T.contiguous()

    def _onednn(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        rounded, scale = round_tokens(x)
        q = rounded.add_(INPUT_ZERO).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            q,
            1.0,
            INPUT_ZERO,
            self._packed,
            self._scale,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        product.mul_(scale[:, None])
        y: Tensor = product if bias is None else product.add_(bias)
        return y.to(dtype)


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 [T, in] of whole numbers in -127..127, scale float32 [T]): ``x ~ q * scale``."""
    top = x.abs().amax(1).float()
    scale = torch.where(top <= 1e-30, torch.ones_like(top), top / 127)  # a NaN stays
    # As native/integer.h: times the inverse, and rounded once, from the exact product.
    inverse = torch.where(scale <= 3e38, 1 / scale, torch.zeros_like(scale))
    return (x.double() * inverse[:, None].double()).round_().float(), scale


def _pack(q: Tensor) -> Tensor:
    """int8 [out, in] -> uint8 [out / 16, in / 4, 16, 4] of q + 128, as native/w8a8.c reads it."""
    bytes_ = (q.view(torch.uint8) ^ 128).contiguous()
    padded = F.pad(bytes_, (0, -q.shape[1] % QUAD, 0, -q.shape[0] % LANES), value=128)
    return padded.view(-1, LANES, padded.shape[1] // QUAD, QUAD).transpose(1, 2).contiguous()


def _unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    rows = packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, :in_features]
    return (rows.contiguous() ^ 128).view(torch.int8)
