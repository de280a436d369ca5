"""Base linears from float weights, and several of them joined into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.kernels.base.dense import DenseLinear
from deltaserve.kernels.base.int4 import Int4Linear
from deltaserve.kernels.base.int8 import Int8Linear
from deltaserve.kernels.base.linear import BaseLinear
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
    activations: "float", or with int8 also "int8": inputs are quantized per token as they come.
    """
    if activations not in ("float", "int8"):
        raise ValueError(f'activations is "{activations}"; it must be "float" or "int8"')
    if activations == "int8" and quantize != "int8":
        raise ValueError(f'activations "int8" needs quantize "int8", not "{quantize}"')
    if quantize == "none":
        return DenseLinear(weight, bias, dtype)
    if quantize == "int8":
        found = quantize_weight(weight, 8)
        return Int8Linear(found["q"], found["scale"], bias, dtype, activations)
    if quantize == "int4":
        found = quantize_weight(weight, 4, group_size)
        q, scale, zero = found["q"], found["scale"], found["zero"]
        return Int4Linear(q, scale, zero, bias, dtype, group_size)
    raise ValueError(f'quantize is "{quantize}"; it must be "none", "int8" or "int4"')


def concat(linears: Sequence[BaseLinear]) -> BaseLinear:
    """One linear whose outputs are those of `linears`, one after the other.

    They must be of one kind, dtype and in_features; a missing bias is zeros if another has one.
    """
    first = linears[0]
    for other in linears[1:]:
        if type(other) is not type(first) or other.dtype != first.dtype:
            raise ValueError(f"cannot join {_name(first)} and {_name(other)}: kinds must be equal")
        if other.in_features != first.in_features:
            raise ValueError(f"cannot join in_features {first.in_features} and {other.in_features}")
    if len(linears) == 1:
        return first
    bias = _bias(linears)
    held = [linear.held() for linear in linears]
    if isinstance(first, DenseLinear):
        return DenseLinear(torch.cat([h["weight"] for h in held]), bias, first.dtype)
    q = torch.cat([h["q"] for h in held])
    scale = torch.cat([h["scale"] for h in held])
    if isinstance(first, Int8Linear):
        if len({linear.activations for linear in linears if isinstance(linear, Int8Linear)}) > 1:
            raise ValueError("cannot join int8 linears of different activations")
        return Int8Linear(q, scale, bias, first.dtype, first.activations)
    assert isinstance(first, Int4Linear)
    if len({linear.group_size for linear in linears if isinstance(linear, Int4Linear)}) > 1:
        raise ValueError("cannot join int4 linears of different group sizes")
    zero = torch.cat([h["zero"] for h in held])
    return Int4Linear(q, scale, zero, bias, first.dtype, first.group_size)


def _bias(linears: Sequence[BaseLinear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    dtype = linears[0].dtype
    missing = [torch.zeros(linear.out_features, dtype=dtype) for linear in linears]
    return torch.cat(
        [m if ln.bias is None else ln.bias for ln, m in zip(linears, missing, strict=True)]
    )


def _name(linear: BaseLinear) -> str:
    return f"{type(linear).__name__} in {linear.dtype}"
