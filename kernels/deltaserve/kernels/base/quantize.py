"""Round-to-nearest quantization of a weight to int8 or int4."""

from __future__ import annotations

import torch
from torch import Tensor

INT4_GROUP = 64
"""Default number of neighbouring inputs that share a scale and a zero in int4."""

# Narrower ranges tried for each int4 group: clipping the extremes often lowers the squared error.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantize(weight: Tensor, bits: int, group_size: int = INT4_GROUP) -> dict[str, Tensor]:
    """The canonical tensors of ``w ~ (q - zero) * scale``; weight [out, in] of any float dtype.

    bits 8, symmetric per output row: q int8 [out, in] in -127..127, scale float32 [out].
    bits 4, asymmetric per group of `group_size` neighbouring inputs, the last group shorter when
    it does not divide in_features: q uint8 [out, in] in 0..15; scale, zero float32 [out, groups].
    Zeros are whole numbers in 0..15, scales have bfloat16 precision: both fit 16 bits.
    Raises ValueError for other bits, a group size that is not a positive multiple of 8, or weights
    that are not finite.
    """
    w = weight.detach().float()
    if w.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [out, in]")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("weight has values that are not finite; they cannot be quantized")
    if bits == 8:
        return _int8(w)
    if bits == 4:
        return _int4(w, group_size)
    raise ValueError(f"bits is {bits}; it must be 8 or 4")


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int = 0) -> Tensor:
    """float32 [out, in] from canonical tensors; zero None means int8, one scale per row."""
    if zero is None:
        return q.float() * scale[:, None]
    index = torch.arange(q.shape[1]) // group_size
    return (q.float() - zero.float()[:, index]) * scale.float()[:, index]


def check_group_size(group_size: int) -> None:
    if group_size <= 0 or group_size % 8:
        raise ValueError(f"group_size is {group_size}; it must be a positive multiple of 8")


def _int8(w: Tensor) -> dict[str, Tensor]:
    scale = w.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = (w / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"q": q, "scale": scale}


def _int4(w: Tensor, group_size: int) -> dict[str, Tensor]:
    check_group_size(group_size)
    out, inner = w.shape
    groups = -(-inner // group_size)
    if groups * group_size != inner:
        # The last value again: it widens no group's range. Its error counts a few times more.
        w = torch.cat((w, w[:, -1:].expand(out, groups * group_size - inner)), 1)
    grouped = w.reshape(out, groups, group_size)
    high = grouped.amax(-1, keepdim=True).clamp_min(0)
    low = grouped.amin(-1, keepdim=True).clamp_max(0)
    best = torch.full_like(high, torch.inf)
    q, scale, zero = torch.zeros_like(grouped), torch.ones_like(high), torch.zeros_like(high)
    for shrink in SHRINKS:
        q_try, scale_try, zero_try = _round(grouped, low * shrink, high * shrink)
        error = ((q_try - zero_try) * scale_try - grouped).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        q = torch.where(better, q_try, q)
        scale = torch.where(better, scale_try, scale)
        zero = torch.where(better, zero_try, zero)
    q = q.flatten(1)[:, :inner].to(torch.uint8).contiguous()
    return {"q": q, "scale": scale.squeeze(-1), "zero": zero.squeeze(-1)}


def _round(w: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = ((high - low) / 15).bfloat16().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round_().clamp_(0, 15)
    q = (w / scale + zero).round_().clamp_(0, 15)
    return q, scale, zero
