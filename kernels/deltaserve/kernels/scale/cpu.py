"""Scale and Bias on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.primitives import Bias, Scale
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.kernels.table import Table


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


def pack_bias(part: int, primitive: Bias) -> PackedBias:
    return PackedBias(part, cast(primitive.bias, torch.float32))


class BiasTable(Table[PackedBias]):
    def add(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Adds the step's biases to y [T, out], float32, in place."""
        for tokens, strength, item in self.entries(segments):
            y[tokens, self.group.columns(item.part)].add_(item.bias, alpha=strength)


class ScaleTable(Table[PackedScale]):
    """The factors of a mix: ``1 + sum of w (s - 1)``."""

    def input_factor(self, mix: Mix, part: int) -> Tensor | None:
        """float32 [in], or None for no factor."""
        return _factor([(i.input, w) for i, w in self._of(mix, part) if i.input is not None])

    def output_factor(self, mix: Mix, part: int) -> Tensor | None:
        """float32 [out], or None for no factor."""
        return _factor([(i.output, w) for i, w in self._of(mix, part) if i.output is not None])

    def shared_input(self, mix: Mix) -> Tensor | None:
        """The input factor when it is one and the same for every part of the group."""
        parts = range(len(self.group.out_features))
        for slot, _ in mix:
            inputs = [self._input(slot, part) for part in parts]
            if any(i is not inputs[0] for i in inputs[1:]):
                return None
        return self.input_factor(mix, 0)

    def scale_inputs(self, x: Tensor, segments: Segments) -> Tensor:
        """x [T, in] with the runs scaled whose factor is shared; x itself if there are none."""
        found = [(start, end, self.shared_input(mix)) for start, end, mix in segments.runs]
        if all(factor is None for _, _, factor in found):
            return x
        scaled = x.clone()
        for start, end, factor in found:
            if factor is not None:
                scaled[start:end] = x[start:end].float() * factor
        return scaled

    def _of(self, mix: Mix, part: int) -> list[tuple[PackedScale, float]]:
        return [(i, w) for slot, w in mix for i in self.items.get(slot, ()) if i.part == part]

    def _input(self, slot: int, part: int) -> Tensor | None:
        found = [i.input for i in self.items.get(slot, ()) if i.part == part]
        return found[0] if found else None


def _factor(pairs: list[tuple[Tensor, float]]) -> Tensor | None:
    if not pairs:
        return None
    if len(pairs) == 1 and pairs[0][1] == 1:
        return pairs[0][0]
    total = torch.ones_like(pairs[0][0])
    for scale, strength in pairs:
        total.add_(scale - 1, alpha=strength)
    return total
