"""Base linears as loading leaves them, in the layouts that gemm_kernel reads: the same numbers."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from deltaserve.kernels.backend import UnsupportedWeights
from deltaserve.kernels.base import (
    BaseLinear,
    ByteLinear,
    DenseLinear,
    Int4Linear,
    Int8Linear,
    PermutedLinear,
)
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.workspace import Workspace


def held_on_gpu(linear: BaseLinear, device: torch.device, workspace: Workspace) -> GpuLinear:
    """Raises UnsupportedWeights for what the GPU's kernels have no layout for."""
    held, form, group = _form(linear)
    placed = {name: tensor.to(device) for name, tensor in held.items()}
    return GpuLinear(placed, form, linear.dtype, group, device, workspace)


def _form(linear: BaseLinear) -> tuple[dict[str, Tensor], str, int]:
    """(canonical tensors, format, group size) of a GpuLinear with the same weight."""
    if isinstance(linear, Int8Linear | Int4Linear) and linear.activations != "float":
        raise UnsupportedWeights(
            f"activations of {linear.activations}: a GPU computes with float ones alone"
        )
    if isinstance(linear, PermutedLinear):
        held, form, group = _form(linear.inner)
        return {**held, "order": linear.order}, form, group
    if isinstance(linear, DenseLinear):
        return linear.held(), "dense", 0
    if isinstance(linear, Int8Linear):
        return linear.held(), "int8", 0
    if isinstance(linear, Int4Linear):
        return _int4(linear)
    if isinstance(linear, ByteLinear):
        return _bytes(linear)
    raise UnsupportedWeights(f"a GPU has no kernels for {type(linear).__name__}'s weights yet")


def _int4(linear: Int4Linear) -> tuple[dict[str, Tensor], str, int]:
    """Groups that the kernels do not take are cut into equal ones that they do."""
    held, size, width = linear.held(), linear.group_size, linear.in_features
    finer = gcd(size, 128)
    if size >= width or finer == 128 or size in (32, 64):
        return held, "int4", size
    if finer < 32:
        raise UnsupportedWeights(f"int4 in groups of {size} inputs: a GPU takes multiples of 32")
    for name in ("scale", "zero"):
        held[name] = held[name].repeat_interleave(size // finer, 1)[:, : -(-width // finer)]
    return held, "int4", finer


def _bytes(linear: ByteLinear) -> tuple[dict[str, Tensor], str, int]:
    held = linear.held()
    whole = linear.group_size == linear.in_features
    if "zero" in held or not whole:
        shared = "zeros" if whole else f"scales of {linear.group_size} inputs"
        raise UnsupportedWeights(f"{linear.kind} weights with {shared}: a GPU takes one per row")
    form = "int8" if linear.kind == torch.int8 else "fp8"
    q = held["q"].view(torch.int8 if form == "int8" else torch.uint8)
    return {**held, "q": q, "scale": held["scale"].squeeze(1)}, form, 0
