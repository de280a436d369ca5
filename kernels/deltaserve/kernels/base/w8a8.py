"""W8A8: int8 weights times 8-bit inputs, in oneDNN's integer kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.base import onednn
from deltaserve.kernels.native import library

# Inputs are unsigned with this zero: a signed input falls to oneDNN's reference code, 100x slower.
INPUT_ZERO = 128

TOKENS_HINT = 16


class W8A8:
    """q: int8 [out, in]; scale: float32 [out], kept by the caller for as long as this lives."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        if not torch.cpu._is_vnni_supported():
            raise ValueError('activations "int8" needs a processor with VNNI; use "float"')
        self._packed = torch.ops.onednn.qlinear_prepack(q.contiguous(), [TOKENS_HINT, q.shape[1]])
        self._scale = scale
        self._zeros = torch.zeros(len(scale), dtype=torch.int64)
        self.out_features = len(scale)
        self.nbytes = onednn.nbytes(self._packed) + onednn.nbytes(self._zeros)

    def __call__(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x: [T, in] of `dtype`. Returns [T, out] of `dtype`."""
        q, scale = _quantize(x.contiguous())
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
        return _rescale(product, scale, bias, dtype)

    def weight(self) -> Tensor:
        """q [out, in] again, bit for bit."""
        return onednn.unpack(self._packed).T.contiguous()


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 [T, in], float32 scale [T]): ``x ~ (q - 128) * scale``."""
    lib = library()
    if lib is None:
        scale = x.abs().amax(1).float() / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        q = (x.float() / scale[:, None]).round_().add_(INPUT_ZERO).to(torch.uint8)
        return q, scale
    q = torch.empty(x.shape, dtype=torch.uint8)
    scale = torch.empty(x.shape[0])
    lib["ds_quantize_tokens"](
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        *x.shape,
        q.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return q, scale


def _rescale(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    lib = library()
    if lib is None:
        product.mul_(scale[:, None])
        return (product if bias is None else product.add_(bias)).to(dtype)
    y = product if dtype == torch.float32 else torch.empty(product.shape, dtype=dtype)
    lib["ds_rescale"](
        product.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        dtype == torch.bfloat16,
        *product.shape,
        torch.get_num_threads(),
    )
    return y
