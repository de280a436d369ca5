"""Random adapters, batches and bases, and what they must give, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from deltaserve.kernels.primitives import Bit, LowRank, Primitive, SparseCsr
from gpu_kernels.shapes import Batch, Group

Adapter: TypeAlias = Mapping[int, tuple[Primitive, ...]]
"""The primitives of each part of a group."""

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
"""Of x, y and 16-bit weights. Triton's interpreter computes bfloat16 wrongly."""


@dataclass(frozen=True)
class Problem:
    """One step of one group. x: [tokens, in_features] on the device; adapter i of `adapters` is the
    one that the batch calls i; their tensors are in host memory."""

    group: Group
    batch: Batch
    x: Tensor
    adapters: tuple[Adapter, ...]

    @cached_property
    def delta(self) -> Tensor:
        """float64 [tokens, out_features]: what the adapters add."""
        total = torch.zeros(len(self.batch), self.group.out_features, device=DEVICE).double()
        x = self.x.double()
        for i, adapter in enumerate(self.adapters):
            rows = torch.tensor([m for m, slot in enumerate(self.batch) if slot == i])
            if len(rows):
                rows = rows.to(DEVICE)
                total[rows] += adapter_delta(self.group, adapter, x[rows])
        return total


def adapter_delta(group: Group, adapter: Adapter, x: Tensor) -> Tensor:
    """float64 [tokens, out_features] of one adapter, from float64 x."""
    columns = []
    for part, out in enumerate(group.parts):
        y = x.new_zeros(len(x), out)
        for primitive in adapter.get(part, ()):
            y += primitive_delta(primitive, x, out)
        columns.append(y)
    return torch.cat(columns, 1)


def primitive_delta(primitive: Primitive, x: Tensor, out: int) -> Tensor:
    """float64 [tokens, out]. Raises TypeError for a primitive that is not timed here."""

    def move(t: Tensor) -> Tensor:
        return t.to(x.device).double()

    if isinstance(primitive, LowRank):
        return primitive.scale * (x @ move(primitive.a).T) @ move(primitive.b).T
    if isinstance(primitive, Bit):
        total = x.new_zeros(len(x), out)
        for plane, scale in zip(primitive.signs, primitive.scale, strict=True):
            total += (x @ signs(plane.to(x.device), x.shape[1]).double().T) * move(scale)
        return total
    if isinstance(primitive, SparseCsr):
        return x @ dense(primitive, out, x.shape[1]).double().T
    raise TypeError(f"{type(primitive).__name__} is not timed")


def signs(packed: Tensor, in_features: int) -> Tensor:
    """uint8 [out, in / 8] -> float32 [out, in] of +1 and -1, on the tensor's device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    values: Tensor = bits.flatten(-2)[..., :in_features].float()
    found: Tensor = values * 2 - 1
    return found


def dense(primitive: SparseCsr, out: int, in_features: int) -> Tensor:
    """float32 [out, in] on the device."""
    rows = torch.repeat_interleave(torch.arange(out), primitive.indptr.diff()).to(DEVICE)
    full = torch.zeros(out, in_features, device=DEVICE)
    full[rows, primitive.indices.long().to(DEVICE)] = primitive.values.float().to(DEVICE)
    return full


def activations(tokens: int, group: Group) -> Tensor:
    return torch.randn(tokens, group.in_features, device=DEVICE).to(DTYPE)


def weight(group: Group) -> Tensor:
    """[out_features, in_features] of DTYPE on the device, of a size that keeps y near 1."""
    shape = (group.out_features, group.in_features)
    return (torch.randn(shape, device=DEVICE) / group.in_features**0.5).to(DTYPE)


def low_rank(group: Group, rank: int, scale: float = 2.0) -> Adapter:
    inner = group.in_features
    return {
        part: (
            LowRank(
                (torch.randn(rank, inner) / inner**0.5).to(DTYPE),
                (torch.randn(out, rank) / rank**0.5).to(DTYPE),
                scale,
            ),
        )
        for part, out in enumerate(group.parts)
    }


def one_bit(group: Group) -> Adapter:
    inner = group.in_features
    return {
        part: (
            Bit(
                torch.randint(0, 256, (1, out, inner // 8), dtype=torch.uint8),
                (0.5 + torch.rand(1, out)) / inner**0.5,
            ),
        )
        for part, out in enumerate(group.parts)
    }


def sparse(group: Group, density: float) -> Adapter:
    """Every weight is changed with the same probability: rows differ in length, as they do in
    files."""
    inner = group.in_features
    adapter: dict[int, tuple[Primitive, ...]] = {}
    for part, out in enumerate(group.parts):
        rows, columns = (torch.rand(out, inner, device=DEVICE) < density).nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=out).cpu()
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        values = torch.randn(len(columns)) / (density * inner) ** 0.5
        adapter[part] = (SparseCsr(indptr, columns.int().cpu(), values.to(DTYPE)),)
    return adapter


def distinct(make: Sequence[Adapter], adapters: int) -> tuple[Adapter, ...]:
    """`adapters` adapters that hold the given ones in turn: each is installed in memory of its
    own, so only the time to make them is saved."""
    return tuple(make[i % len(make)] for i in range(adapters))
