"""Scale and Bias on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.native import library
from deltaserve.kernels.native.pointers import PointerTable, apply_vectors
from deltaserve.kernels.primitives import Bias, Scale
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.kernels.table import Group, Table

# vector_item of native/vectors.c
ITEM = (("vector", "u8"), ("column", "i8"), ("out", "i8"))


@dataclass(frozen=True, eq=False, slots=True)
class PackedScale:
    """input: float32 [in] or None; output: float32 [out] or None. They are held in float32
    whatever the compute dtype: vectors are small, and 1 + w (s - 1) must not round."""

    part: int
    input: Tensor | None
    output: Tensor | None

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.input, self.output) if t is not None)


@dataclass(frozen=True, eq=False, slots=True)
class PackedBias:
    """bias: float32 [out]."""

    part: int
    bias: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bias,)


def pack_scales(scales: Sequence[tuple[int, Scale]]) -> tuple[PackedScale, ...]:
    """(part, primitive) pairs of one adapter; equal input vectors become one tensor."""
    packed: list[PackedScale] = []
    known: list[Tensor] = []
    for part, primitive in scales:
        inputs = None if primitive.input is None else cast(primitive.input, torch.float32)
        if inputs is not None:
            same = [k for k in known if torch.equal(k, inputs)]
            inputs = same[0] if same else inputs
            known.append(inputs)
        output = None if primitive.output is None else cast(primitive.output, torch.float32)
        packed.append(PackedScale(part, inputs, output))
    return tuple(packed)


def pack_biases(biases: Sequence[tuple[int, Bias]]) -> tuple[PackedBias, ...]:
    """(part, primitive) pairs of one adapter; several on one part are added up."""
    packed: list[PackedBias] = []
    for part in sorted({part for part, _ in biases}):
        own = [cast(bias.bias, torch.float32) for p, bias in biases if p == part]
        packed.append(PackedBias(part, own[0] if len(own) == 1 else torch.stack(own).sum(0)))
    return tuple(packed)


class BiasTable(Table[PackedBias]):
    """One native call serves every entry of the step and every part."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.pointers = PointerTable(ITEM)

    @property
    def rounds_once(self) -> bool:
        return library() is not None

    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's biases to y [T, out] in place."""
        if apply_vectors(y, segments, self.pointers, factor=False):
            return
        for tokens, strength, item in self.entries(segments):
            y[tokens, self.columns[item.part]].add_(item.bias, alpha=strength)

    def _changed(self, slot: int) -> None:
        items = self.items.get(slot, ())
        self.pointers.put(slot, [_row(self.columns[i.part], i.bias) for i in items])


class ScaleTable(Table[PackedScale]):
    """The factors of a mix: ``1 + sum of w (s - 1)``."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.inputs = PointerTable(ITEM)
        self.outputs = PointerTable(ITEM)
        self.split: set[int] = set()
        """Slots whose parts want different inputs, which takes a product for each of those."""
        self._scaling: set[int] = set()  # slots that scale inputs at all

    def scales_inputs(self, mix: Mix) -> bool:
        """Whether an adapter of the mix scales some part's inputs."""
        return any(slot in self._scaling for slot, _ in mix)

    def split_runs(self, segments: Segments) -> list[tuple[int, int, Mix]]:
        """The runs in which the parts of the group want different inputs."""
        if self.split.isdisjoint(segments.slots):
            return []
        return [run for run in segments.runs if self._splits(run[2])]

    def _splits(self, mix: Mix) -> bool:
        return any(slot in self.split for slot, _ in mix)

    def input_factor(self, mix: Mix, part: int) -> Tensor | None:
        """float32 [in], or None for no factor."""
        return _factor([(i.input, w) for i, w in self._of(mix, part) if i.input is not None])

    def output_factor(self, mix: Mix, part: int) -> Tensor | None:
        """float32 [out], or None for no factor."""
        return _factor([(i.output, w) for i, w in self._of(mix, part) if i.output is not None])

    def scale_inputs(self, x: Tensor, segments: Segments) -> Tensor:
        """x [T, in] with the runs scaled whose parts want the same; x itself if there are none."""
        if self._scaling.isdisjoint(segments.slots):
            return x
        found = [
            (start, end, mix)
            for start, end, mix in segments.runs
            if self.scales_inputs(mix) and not self._splits(mix)
        ]
        if not found:
            return x
        scaled = x.clone()
        if self.split.isdisjoint(segments.slots) and apply_vectors(
            scaled, segments, self.inputs, factor=True
        ):
            return scaled
        for start, end, mix in found:
            factor = self.input_factor(mix, 0)
            assert factor is not None
            scaled[start:end] = x[start:end].float() * factor
        return scaled

    def scale_outputs(self, y: Tensor, bias: Tensor | None, segments: Segments) -> None:
        """y [T, out], float32: ``(y - bias) * factor + bias``, in place. bias: [out]."""
        if apply_vectors(y, segments, self.outputs, factor=True, bias=bias):
            return
        wide = None if bias is None else bias.float()
        for start, end, mix in segments.runs:
            for part in range(len(self.group.out_features)):
                factor = self.output_factor(mix, part)
                if factor is not None:
                    columns = self.columns[part]
                    own = 0 if wide is None else wide[columns]
                    y[start:end, columns] = (y[start:end, columns] - own) * factor + own

    def _of(self, mix: Mix, part: int) -> list[tuple[PackedScale, float]]:
        return [(i, w) for slot, w in mix for i in self.items.get(slot, ()) if i.part == part]

    def _changed(self, slot: int) -> None:
        items = self.items.get(slot, ())
        given = {i.part: i.input for i in items}
        inputs = [given.get(part) for part in range(len(self.columns))]
        self.split.discard(slot)
        self._scaling.discard(slot)
        if any(i is not None for i in inputs):
            self._scaling.add(slot)
        if any(i is not inputs[0] for i in inputs[1:]):
            self.split.add(slot)
        shared = inputs[0] if inputs and slot not in self.split else None
        # The inputs are one vector of the whole group: as if it were part 0, as long as x.
        rows = [] if shared is None else [(shared.data_ptr(), 0, self.group.in_features)]
        self.inputs.put(slot, rows)
        columns = self.columns
        outputs = [_row(columns[i.part], i.output) for i in items if i.output is not None]
        self.outputs.put(slot, outputs)


def _row(columns: slice, vector: Tensor) -> tuple[int, int, int]:
    return vector.data_ptr(), columns.start, columns.stop - columns.start


def _factor(pairs: list[tuple[Tensor, float]]) -> Tensor | None:
    if not pairs:
        return None
    if len(pairs) == 1 and pairs[0][1] == 1:
        return pairs[0][0]
    # The ones first: 1 + (s - 1) would round a small s.
    total = torch.full_like(pairs[0][0], 1 - sum(w for _, w in pairs))
    for scale, strength in pairs:
        total.add_(scale, alpha=strength)
    return total
