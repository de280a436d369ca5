"""LinearDeltas: what a step's adapters do to one group of linears that share their input."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.base.linear import BaseLinear
from deltaserve.kernels.bit import cpu as bit_cpu
from deltaserve.kernels.check import check_linear
from deltaserve.kernels.gated import cpu as gated_cpu
from deltaserve.kernels.lowrank import cpu as lowrank_cpu
from deltaserve.kernels.native.stack import NativeGroup, NativeLinear
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    GatedLowRank,
    LowRank,
    Primitive,
    Replace,
    ReplaceRows,
    Scale,
)
from deltaserve.kernels.product import change
from deltaserve.kernels.replace import cpu as replace_cpu
from deltaserve.kernels.scale import cpu as scale_cpu
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.sparse import cpu as sparse_cpu
from deltaserve.kernels.table import Group, Packed, Table, unique_bytes
from deltaserve.kernels.wide import widen


@dataclass(frozen=True, eq=False, slots=True)
class PreparedLinear:
    """One adapter's primitives on one group, ready to be installed."""

    lowrank: tuple[lowrank_cpu.PackedLowRank, ...] = ()
    gated: tuple[gated_cpu.PackedGated, ...] = ()
    bit: tuple[bit_cpu.PackedBit, ...] = ()
    sparse: tuple[sparse_cpu.PackedSparse, ...] = ()
    scale: tuple[scale_cpu.PackedScale, ...] = ()
    bias: tuple[scale_cpu.PackedBias, ...] = ()
    replace: tuple[replace_cpu.PackedReplace, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor it keeps in memory, those that parts share only once."""
        items: tuple[Packed, ...] = (
            *self.lowrank, *self.gated, *self.bit, *self.sparse, *self.scale, *self.bias,
            *self.replace,
        )  # fmt: skip
        return tuple({id(t): t for item in items for t in item.tensors()}.values())

    def only(self, parts: Collection[int]) -> PreparedLinear:
        """What it has on some parts of the group, over the same tensors."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return PreparedLinear(
            **{name: tuple(i for i in items if i.part in parts) for name, items in kept.items()}
        )

    @property
    def nbytes(self) -> int:
        """Exact bytes, shared memory counted once."""
        return unique_bytes(self.tensors())


def prepare(parts: Mapping[int, tuple[Primitive, ...]], group: Group) -> PreparedLinear:
    """Casts and packs the primitives of each part for serving. Safe from any thread.

    Raises ValueError for a primitive that linears do not take, or of the wrong shape.
    """
    for part, primitives in parts.items():
        check_linear(part, primitives, group)
    dtype = group.dtype
    flat = [(part, p) for part, primitives in parts.items() for p in primitives]
    kinds = (LowRank, GatedLowRank, Bit, Scale, Bias, Replace, ReplaceRows)
    return PreparedLinear(
        lowrank=tuple(lowrank_cpu.pack(i, p, dtype) for i, p in flat if isinstance(p, LowRank)),
        gated=tuple(gated_cpu.pack(i, p, dtype) for i, p in flat if isinstance(p, GatedLowRank)),
        bit=bit_cpu.pack([(i, p) for i, p in flat if isinstance(p, Bit)]),
        sparse=sparse_cpu.pack(
            [(i, p) for i, p in flat if not isinstance(p, kinds)],
            dtype,
            group.out_features,
        ),
        scale=scale_cpu.pack_scales([(i, p) for i, p in flat if isinstance(p, Scale)]),
        bias=scale_cpu.pack_biases([(i, p) for i, p in flat if isinstance(p, Bias)]),
        replace=tuple(
            replace_cpu.pack(i, p, dtype) for i, p in flat if isinstance(p, Replace | ReplaceRows)
        ),
    )


# In the order of `LinearDeltas._tables`.
_items = attrgetter("lowrank", "gated", "bit", "sparse", "bias", "scale", "replace")


class LinearDeltas:
    """in_features; out_features of each part; dtype: of x and y, float32 or bfloat16."""

    def __init__(self, in_features: int, out_features: Sequence[int], dtype: torch.dtype) -> None:
        self.group = Group(in_features, tuple(out_features), dtype)
        self._prepared: dict[int, PreparedLinear] = {}
        self._lowrank = lowrank_cpu.LowRankTable(self.group)
        self._gated = gated_cpu.GatedTable(self.group)
        self._bit = bit_cpu.BitTable(self.group)
        self._sparse = sparse_cpu.SparseTable(self.group)
        self._bias = scale_cpu.BiasTable(self.group)
        self._scale = scale_cpu.ScaleTable(self.group)
        self._replace = replace_cpu.ReplaceTable(self.group)
        self._additive = (self._lowrank, self._gated, self._bit, self._sparse, self._bias)
        self._tables: tuple[Table[Any], ...] = (*self._additive, self._scale, self._replace)

    def prepare(self, parts: Mapping[int, tuple[Primitive, ...]]) -> PreparedLinear:
        """See `prepare`."""
        return prepare(parts, self.group)

    def install(self, slot: int, prepared: PreparedLinear) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread."""
        if slot in self._prepared:
            self.remove(slot)
        self._prepared[slot] = prepared
        for table, items in zip(self._tables, _items(prepared), strict=True):
            if items:
                table.install(slot, items)

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        prepared = self._prepared.pop(slot, None)
        if prepared is None:
            return
        for table, items in zip(self._tables, _items(prepared), strict=True):
            if items:
                table.remove(slot)

    @property
    def nbytes(self) -> int:
        """Exact bytes installed, memory shared between slots counted once."""
        return unique_bytes([t for p in self._prepared.values() for t in p.tensors()])

    def is_native(self, slot: int) -> bool:
        """Whether `native` does all that the slot's adapter does, to entries of few tokens."""
        return not (
            slot in self._gated.items
            or slot in self._replace.items
            or slot in self._sparse.others
            or slot in self._scale.split
        )

    def native(self, base: NativeLinear) -> NativeGroup:
        """The group as native code calls it, valid as long as this lives."""
        made = NativeGroup(base)
        made.inputs, made.outputs = self._scale.inputs.address, self._scale.outputs.address
        made.lowrank, made.bit = self._lowrank.pointers.address, self._bit.pointers.address
        made.csr, made.rows = self._sparse.csr.address, self._sparse.rows.address
        made.bias = self._bias.pointers.address
        return made

    def forward(self, x: Tensor, base: BaseLinear, segments: Segments) -> Tensor:
        """x: [T, in]. Returns [T, sum of out_features] of x's dtype.

        Tokens without an adapter get exactly what ``base(x)`` gives.
        """
        if segments.slots.isdisjoint(self._prepared):
            return base(x)
        x = x.contiguous()
        changing = self._scale.touches(segments) or self._replace.touches(segments)
        adding = [table for table in self._additive if table.touches(segments)]
        y = base(self._scale.scale_inputs(x, segments) if changing else x)
        if not changing and len(adding) == 1 and adding[0].rounds_once:
            adding[0].add(x, y, segments)
            return y
        # Several families add up in float32 and are rounded once; base rows survive the round trip.
        total = widen(y)
        if changing:
            change(x, total, base, segments, self._scale, self._replace)
        for table in adding:
            table.add(x, total, segments)
        return y if total is y else y.copy_(total)
