"""Sparse deltas on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.native import library
from deltaserve.kernels.native.pointers import PointerTable, add_deltas
from deltaserve.kernels.primitives import (
    Sparse,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
    tensors,
)
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group, Table

# csr_item of native/csr.c
ITEM = (
    ("indptr", "u8"),
    ("indices", "u8"),
    ("values", "u8"),
    ("column", "i8"),
    ("out", "i4"),
    ("bf16", "i4"),
)

# Values multiplied at a time: bounds the products [T, values] held in between.
BLOCK_VALUES = 1 << 16

# Up to so many tokens whole rows are multiplied one by one: a product costs more in calls.
FEW_TOKENS = 4

Dense: TypeAlias = SparseRows | SparseCols | SparseBlocks


@dataclass(frozen=True, eq=False, slots=True)
class PackedSparse:
    """The primitive with its values in the serving dtype."""

    part: int
    primitive: Sparse

    def tensors(self) -> tuple[Tensor, ...]:
        return tensors(self.primitive)


def pack(
    sparse: Sequence[tuple[int, Sparse]], dtype: torch.dtype, out_features: Sequence[int]
) -> tuple[PackedSparse, ...]:
    """(part, primitive) pairs of one adapter; several CSR on one part become one."""
    packed: list[PackedSparse] = []
    for part in sorted({part for part, _ in sparse}):
        csr = [p for own, p in sparse if own == part and isinstance(p, SparseCsr)]
        if csr:
            joined = csr[0] if len(csr) == 1 else _join(csr, out_features[part])
            packed.append(PackedSparse(part, _cast_csr(joined, dtype)))
    for part, primitive in sparse:
        if not isinstance(primitive, SparseCsr):
            values = cast(primitive.values, dtype)
            index = primitive.index.to(torch.int64).contiguous()
            packed.append(PackedSparse(part, replace(primitive, values=values, index=index)))
    return tuple(packed)


def _cast_csr(csr: SparseCsr, dtype: torch.dtype) -> SparseCsr:
    keep = torch.bfloat16 if csr.values.dtype == torch.bfloat16 else dtype
    return SparseCsr(
        cast(csr.indptr, torch.int64), cast(csr.indices, torch.int32), cast(csr.values, keep)
    )


def _join(matrices: Sequence[SparseCsr], out_features: int) -> SparseCsr:
    counts = torch.stack([m.indptr.diff() for m in matrices]).sum(0)
    rows = torch.cat(
        [torch.repeat_interleave(torch.arange(out_features), m.indptr.diff()) for m in matrices]
    )
    indices = torch.cat([m.indices for m in matrices])
    values = torch.cat([m.values for m in matrices])
    # An input twice in a row is two terms of its sum, which is what the kernels compute.
    order = rows.argsort(stable=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return SparseCsr(indptr, indices[order], values[order])


class SparseTable(Table[PackedSparse]):
    """CSR in one native call for the whole step; rows, columns and blocks as small products."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._pointers = PointerTable(ITEM)

    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out], float32, in place. x: [T, in]."""
        done = add_deltas("ds_csr", x, y, segments, self._pointers)
        for tokens, strength, item in self.entries(segments):
            primitive = item.primitive
            columns = self.group.columns(item.part)
            if isinstance(primitive, SparseRows) and _few_rows(
                primitive, x, y, tokens, columns, strength
            ):
                continue
            out = y[tokens, columns]
            if not isinstance(primitive, SparseCsr):
                _dense(primitive, x[tokens], out, strength)
            elif not done:
                out.add_(_csr(primitive, x[tokens], out.shape[1]), alpha=strength)

    def _changed(self, slot: int) -> None:
        rows: list[tuple[int, ...]] = []
        for item in self.items.get(slot, ()):
            if isinstance(item.primitive, SparseCsr):
                column, end = (
                    self.group.columns(item.part).start,
                    self.group.columns(item.part).stop,
                )
                pointers = [t.data_ptr() for t in item.tensors()]
                is_bf16 = item.primitive.values.dtype == torch.bfloat16
                rows.append((*pointers, column, end - column, is_bf16))
        self._pointers.put(slot, rows)


def _csr(csr: SparseCsr, x: Tensor, out_features: int) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(out_features), csr.indptr.diff())
    y = torch.zeros(x.shape[0], out_features)
    for start in range(0, len(rows), BLOCK_VALUES):
        here = slice(start, start + BLOCK_VALUES)
        products = x[:, csr.indices[here]].float() * csr.values[here].float()
        y.index_add_(1, rows[here], products)
    return y


def _few_rows(
    rows: SparseRows, x: Tensor, y: Tensor, tokens: slice, columns: slice, strength: float
) -> bool:
    """Adds to y [T, out], float32, in place. False where that is not the way: for many tokens, or
    without native kernels."""
    lib = library()
    if lib is None or tokens.stop - tokens.start > FEW_TOKENS:
        return False
    width, values = y.shape[1], rows.values
    assert y.dtype == torch.float32 and rows.index.is_contiguous() and values.is_contiguous()
    lib["ds_rows"](
        x.data_ptr() + tokens.start * x.shape[1] * x.element_size(),
        x.dtype == torch.bfloat16,
        tokens.stop - tokens.start,
        x.shape[1],
        values.data_ptr(),
        values.dtype == torch.bfloat16,
        rows.index.data_ptr(),
        len(rows.index),
        strength,
        y.data_ptr() + (tokens.start * width + columns.start) * y.element_size(),
        width,
    )
    return True


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
