"""Weights: a base linear's tensors in the layout that gemm_kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.base import words
from deltaserve.kernels.gpu.config import GroupKey


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """format: "dense", "int8", "uint8", "int4", "code4", "fp8", "w8a8" or "w4a8". weight: words
    (base/words.py), or [out, in] of a dense format. group_size: inputs of one scale, 0 if that is
    for a whole row. scale of int4, w4a8 and uint8: int32 [groups, out], the zero in the upper half,
    both of type dtype, or float32 beside zero where they are not exact in it; of the others:
    float32 [groups, out], or [out] without groups. zero of code4: float32 [16], the numbers that
    codes stand for. What a format has no use for may hold anything. bias: [out] or None. dtype: of
    x and y. whole_zeros: whether the zeros of int4 are whole numbers, as all but HQQ's are. order:
    int32 [in], the column of x that each column of the weight is for, or None if they are in one
    order."""

    format: str
    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype
    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    whole_zeros: bool = True
    order: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def key(self, gated: bool = False) -> GroupKey:
        """What tables of configurations know it by."""
        return GroupKey(self.format, self.group_size, self.in_features, self.out_features, gated)


def pack_weight(q: Tensor, format: str) -> Tensor:
    """The whole numbers or codes [out, in] of a quantized format, as `Weights` holds them."""
    if format == "w8a8":
        return words.pack_whole_bytes(q)
    octets = q.view(torch.uint8)
    if format == "w4a8":
        return words.pack_half_bytes(octets)
    if format in ("int4", "code4"):
        return words.pack_nibbles(octets)
    return words.pack_bytes(octets if format == "fp8" else octets ^ 128)


def unpack_weight(weight: Tensor, format: str, in_features: int) -> Tensor:
    """What `pack_weight` was given, of some rows: weight [groups of inputs, rows, ...]."""
    if format == "w8a8":
        return words.unpack_whole_bytes(weight, in_features)
    if format == "w4a8":
        return words.unpack_half_bytes(weight, in_features)
    if format in ("int4", "code4"):
        return words.unpack_nibbles(weight, in_features)
    octets = words.unpack_bytes(weight, in_features)
    return octets if format == "fp8" else (octets ^ 128).view(torch.int8)
