"""Sparse deltas on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
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
CSR_ITEM = (
    ("indptr", "u8"),
    ("indices", "u8"),
    ("values", "u8"),
    ("column", "i8"),
    ("out", "i4"),
    ("bf16", "i4"),
)

# rows_item of native/rows.c
ROWS_ITEM = (("values", "u8"), ("index", "u8"), ("column", "i8"), ("rows", "i4"), ("bf16", "i4"))

# Values multiplied at a time: bounds the products [T, values] held in between.
BLOCK_VALUES = 1 << 16

# Up to so many tokens of an entry whole rows are multiplied one by one (FEW of native/jobs.h): a
# product costs more in calls.
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
    """CSR, and whole rows for few tokens, in one native call each for the whole step; the others as
    small products."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.csr = PointerTable(CSR_ITEM)
        self.rows = PointerTable(ROWS_ITEM)
        self.others: set[int] = set()
        """Slots that hold more than the two tables do."""

    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's deltas to y [T, out], float32, in place. x: [T, in]."""
        done = add_deltas("ds_csr", x, y, segments, self.csr)
        if done:
            add_deltas("ds_rows", x, y, segments, self.rows)
        for start, end, slot, strength in segments.entries:
            for i, item in enumerate(self.items.get(slot, ())):
                if done and self._is_native(slot, i, end - start):
                    continue
                primitive, columns = item.primitive, self.columns[item.part]
                out = y[start:end, columns]
                if isinstance(primitive, SparseCsr):
                    out.add_(_csr(primitive, x[start:end], out.shape[1]), alpha=strength)
                else:
                    _dense(primitive, x[start:end], out, strength)

    def _is_native(self, slot: int, i: int, tokens: int) -> bool:
        """Whether the native kernels have served item i of a slot."""
        primitive = self.items[slot][i].primitive
        if isinstance(primitive, SparseRows):
            return tokens <= FEW_TOKENS and self._first_rows(slot, i)
        return isinstance(primitive, SparseCsr)

    def _first_rows(self, slot: int, i: int) -> bool:
        """Whether item i, of rows, is the only one of its part that the table can hold: two could
        be added to the same outputs at once."""
        own = self.items[slot]
        return not any(
            isinstance(own[j].primitive, SparseRows) and own[j].part == own[i].part
            for j in range(i)
        )

    def _changed(self, slot: int) -> None:
        csr: list[tuple[int, ...]] = []
        rows: list[tuple[int, ...]] = []
        own = self.items.get(slot, ())
        for i, item in enumerate(own):
            primitive, columns = item.primitive, self.columns[item.part]
            is_bf16 = primitive.values.dtype == torch.bfloat16
            if isinstance(primitive, SparseCsr):
                pointers = [t.data_ptr() for t in item.tensors()]
                csr.append((*pointers, columns.start, columns.stop - columns.start, is_bf16))
            elif isinstance(primitive, SparseRows) and self._first_rows(slot, i):
                values, index = primitive.values.data_ptr(), primitive.index.data_ptr()
                rows.append((values, index, columns.start, len(primitive.index), is_bf16))
        self.csr.put(slot, csr)
        self.rows.put(slot, rows)
        self.others.discard(slot)
        if len(csr) + len(rows) < len(own):
            self.others.add(slot)


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
