"""Base linears as loading leaves them, in the layouts that gemm_kernel reads: the same numbers."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from deltaserve.kernels.backend import UnsupportedWeights
from deltaserve.kernels.base import (
    BaseLinear,
    ByteLinear,
    Code4Linear,
    DenseLinear,
    Int4Linear,
    Int8Linear,
    PermutedLinear,
)
from deltaserve.kernels.gpu.base import DEEPEST, GpuLinear
from deltaserve.kernels.gpu.workspace import Workspace

SMALLEST = 8
"""Inputs that may have a scale of their own."""

FARTHEST = 128
"""Between a zero and the middle of a byte's numbers: their differences are exact in bfloat16."""


def held_on_gpu(linear: BaseLinear, device: torch.device, workspace: Workspace) -> GpuLinear:
    """Raises UnsupportedWeights for what the GPU's kernels have no layout for."""
    held, form, group = _form(linear)
    placed = {name: tensor.to(device) for name, tensor in held.items()}
    return GpuLinear(placed, form, linear.dtype, group, device, workspace)


def _form(linear: BaseLinear) -> tuple[dict[str, Tensor], str, int]:
    """(canonical tensors, format, group size) of a GpuLinear with the same weight."""
    if isinstance(linear, PermutedLinear):
        held, form, group = _form(linear.inner)
        return {**held, "order": linear.order}, form, group
    if isinstance(linear, DenseLinear):
        return linear.held(), "dense", 0
    if isinstance(linear, Int8Linear):
        return linear.held(), "int8" if linear.activations == "float" else "w8a8", 0
    if isinstance(linear, Int4Linear | Code4Linear):
        form = "code4"
        if isinstance(linear, Int4Linear):
            form = "int4" if linear.activations == "float" else "w4a8"
        return _grouped(linear.held(), form, linear.group_size, linear.in_features)
    if isinstance(linear, ByteLinear):
        return _bytes(linear)
    raise UnsupportedWeights(f"a GPU has no kernels for {type(linear).__name__}'s weights")


def _bytes(linear: ByteLinear) -> tuple[dict[str, Tensor], str, int]:
    held, size = linear.held(), linear.group_size
    whole, zero = size == linear.in_features, held.get("zero")
    form = "int8" if linear.kind == torch.int8 else "fp8"
    held["q"] = held["q"].view(torch.int8 if form == "int8" else torch.uint8)
    if zero is not None:
        if form == "fp8":
            raise UnsupportedWeights("8-bit floats with zeros: a GPU takes whole numbers with them")
        if not torch.equal(zero, zero.round()) or float(zero.abs().max()) > FARTHEST:
            raise UnsupportedWeights(
                f"whole numbers of 8 bits with zeros of up to {float(zero.abs().max()):g} from "
                f"their middle: a GPU takes whole ones of up to {FARTHEST}"
            )
        return _grouped(held, "uint8", size, linear.in_features)
    if not whole:
        return _grouped(held, form, size, linear.in_features)
    return {**held, "scale": held["scale"].squeeze(1)}, form, 0


def _grouped(
    held: dict[str, Tensor], form: str, size: int, width: int
) -> tuple[dict[str, Tensor], str, int]:
    """Groups that the kernels do not take are cut into equal ones that they do."""
    finer = gcd(size, DEEPEST)
    if size >= width or finer == DEEPEST:
        return held, form, size
    if finer < SMALLEST:
        raise UnsupportedWeights(
            f"scales for {size} inputs each: a GPU takes multiples of {SMALLEST}"
        )
    for name in ("scale", "zero"):
        if name in held:
            held[name] = held[name].repeat_interleave(size // finer, 1)[:, : -(-width // finer)]
    return held, form, finer
