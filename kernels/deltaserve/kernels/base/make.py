"""Base linears from float weights, and several of them joined into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.kernels.base.bytes import ByteLinear
from deltaserve.kernels.base.code4 import Code4Linear
from deltaserve.kernels.base.dense import DenseLinear
from deltaserve.kernels.base.int4 import Int4Linear
from deltaserve.kernels.base.int8 import Int8Linear
from deltaserve.kernels.base.linear import BaseLinear
from deltaserve.kernels.base.permuted import PermutedLinear
from deltaserve.kernels.base.quantize import INT4_GROUP
from deltaserve.kernels.base.quantize import quantize as quantize_weight


def make_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    quantize: str = "none",
    group_size: int = INT4_GROUP,
    activations: str = "float",
) -> BaseLinear:
    """A base linear from a float weight [out, in].

    quantize: "none", "int8" (per output row) or "int4" (per group of `group_size` inputs).
    activations: "float", or with quantized weights "int8": each token's inputs are quantized.
    """
    if activations not in ("float", "int8"):
        raise ValueError(f'activations is "{activations}"; it must be "float" or "int8"')
    if activations == "int8" and quantize == "none":
        raise ValueError('activations "int8" needs quantize "int8" or "int4", not "none"')
    if quantize == "none":
        return DenseLinear(weight, bias, dtype)
    if quantize == "int8":
        found = quantize_weight(weight, 8)
        return Int8Linear(found["q"], found["scale"], bias, dtype, activations)
    if quantize == "int4":
        found = quantize_weight(weight, 4, group_size)
        q, scale, zero = found["q"], found["scale"], found["zero"]
        return Int4Linear(q, scale, zero, bias, dtype, group_size, activations)
    raise ValueError(f'quantize is "{quantize}"; it must be "none", "int8" or "int4"')


def concat(linears: Sequence[BaseLinear]) -> BaseLinear:
    """One linear whose outputs are those of `linears`, one after the other.

    They must be held alike (`BaseLinear.likeness`); a missing bias is zeros if another has one.
    """
    first = linears[0]
    for other in linears[1:]:
        if other.likeness() != first.likeness():
            raise ValueError(
                f"cannot join linears that are held as {first.likeness()} and {other.likeness()}"
            )
    if len(linears) == 1:
        return first
    if isinstance(first, PermutedLinear):
        inner = [linear.inner for linear in linears if isinstance(linear, PermutedLinear)]
        return PermutedLinear(concat(inner), first.order)
    bias = _bias(linears)
    held = [linear.held() for linear in linears]
    if isinstance(first, DenseLinear):
        return DenseLinear(torch.cat([h["weight"] for h in held]), bias, first.dtype)
    q = torch.cat([h["q"] for h in held])
    scale = torch.cat([h["scale"] for h in held])
    if isinstance(first, Code4Linear):
        return Code4Linear(q, held[0]["code"], scale, bias, first.dtype, first.group_size)
    if isinstance(first, Int8Linear):
        return Int8Linear(q, scale, bias, first.dtype, first.activations)
    if isinstance(first, ByteLinear):
        zeros = None if "zero" not in held[0] else torch.cat([h["zero"] for h in held])
        return ByteLinear(q, scale, zeros, bias, first.dtype, first.group_size)
    assert isinstance(first, Int4Linear)
    zero = torch.cat([h["zero"] for h in held])
    return Int4Linear(q, scale, zero, bias, first.dtype, first.group_size, first.activations)


def _bias(linears: Sequence[BaseLinear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    dtype = linears[0].dtype
    missing = [torch.zeros(linear.out_features, dtype=dtype) for linear in linears]
    return torch.cat(
        [m if ln.bias is None else ln.bias for ln, m in zip(linears, missing, strict=True)]
    )
