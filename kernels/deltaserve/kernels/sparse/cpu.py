"""Sparse deltas on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.primitives import (
    Sparse,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
    tensors,
)
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Table

# Values multiplied at a time: bounds the products [T, values] held in between.
BLOCK_VALUES = 1 << 16

Dense: TypeAlias = SparseRows | SparseCols | SparseBlocks


@dataclass(frozen=True, eq=False, slots=True)
class PackedSparse:
    """The primitive with its values in the serving dtype."""

    part: int
    primitive: Sparse

    def tensors(self) -> tuple[Tensor, ...]:
        return tensors(self.primitive)


def pack(part: int, primitive: Sparse, dtype: torch.dtype) -> PackedSparse:
    if isinstance(primitive, SparseCsr):
        keep = torch.bfloat16 if primitive.values.dtype == torch.bfloat16 else dtype
        csr = SparseCsr(
            cast(primitive.indptr, torch.int64),
            cast(primitive.indices, torch.int32),
            cast(primitive.values, keep),
        )
        return PackedSparse(part, csr)
    return PackedSparse(part, replace(primitive, values=cast(primitive.values, dtype)))


class SparseTable(Table[PackedSparse]):
    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out], float32, in place. x: [T, in]."""
        for tokens, strength, item in self.entries(segments):
            out = y[tokens, self.group.columns(item.part)]
            if isinstance(item.primitive, SparseCsr):
                out.add_(_csr(item.primitive, x[tokens], out.shape[1]), alpha=strength)
            else:
                _dense(item.primitive, x[tokens], out, strength)


def _csr(csr: SparseCsr, x: Tensor, out_features: int) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(out_features), csr.indptr.diff())
    y = torch.zeros(x.shape[0], out_features)
    for start in range(0, len(rows), BLOCK_VALUES):
        here = slice(start, start + BLOCK_VALUES)
        products = x[:, csr.indices[here]].float() * csr.values[here].float()
        y.index_add_(1, rows[here], products)
    return y


def _dense(primitive: Dense, x: Tensor, y: Tensor, strength: float) -> None:
    values = primitive.values
    match primitive:
        case SparseRows():
            delta = F.linear(x, values).to(y.dtype).mul_(strength)
            y.index_add_(1, primitive.index, delta)
        case SparseCols():
            y.add_(F.linear(x[:, primitive.index], values).to(y.dtype), alpha=strength)
        case SparseBlocks():
            _, height, width = values.shape
            chosen = x.reshape(len(x), -1, width)[:, primitive.index[:, 1]]
            products = torch.bmm(chosen.transpose(0, 1), values.transpose(1, 2))
            delta = products.transpose(0, 1).to(y.dtype).mul(strength)
            y.view(len(y), -1, height).index_add_(1, primitive.index[:, 0], delta)
