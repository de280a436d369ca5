"""The base product of a step, with the runs whose adapters scale or replace the base weight."""

from __future__ import annotations

from torch import Tensor

from deltaserve.kernels.base.linear import BaseLinear
from deltaserve.kernels.replace.cpu import ReplaceTable
from deltaserve.kernels.scale.cpu import ScaleTable
from deltaserve.kernels.segments import Mix, Segments


def product(
    x: Tensor, base: BaseLinear, segments: Segments, scale: ScaleTable, replace: ReplaceTable
) -> Tensor:
    """``s_out * W (s_in * x) + b`` or ``W' x + b`` of each token, before any delta is added.

    x: [T, in]. Returns [T, out]: of x's dtype when nothing is scaled or replaced, else float32.
    """
    scaled, replaced = scale.touches(segments), replace.touches(segments)
    if not (scaled or replaced):
        return base(x)
    inputs = scale.scale_inputs(x, segments) if scaled else x
    y = base(inputs).float()
    for start, end, mix in segments.runs:
        rows = slice(start, end)
        if scaled:
            _scale(x[rows], y[rows], base, mix, scale)
        if replaced and any(slot in replace.items for slot, _ in mix):
            _replace(x[rows], y[rows], base, mix, scale, replace)
    return y


def _scale(x: Tensor, y: Tensor, base: BaseLinear, mix: Mix, scale: ScaleTable) -> None:
    group = scale.group
    for part in range(len(group.out_features)):
        columns = group.columns(part)
        own = scale.input_factor(mix, part)
        if own is not None and scale.shared_input(mix) is None:
            # The parts disagree on the input: this one gets a product of its own.
            y[:, columns] = base((x.float() * own).to(x.dtype))[:, columns].float()
        factor = scale.output_factor(mix, part)
        if factor is not None:
            y[:, columns] *= factor
            if base.bias is not None:
                y[:, columns] += base.bias[columns] * (1 - factor)


def _replace(
    x: Tensor, y: Tensor, base: BaseLinear, mix: Mix, scale: ScaleTable, replace: ReplaceTable
) -> None:
    replacing = [(slot, w) for slot, w in mix if slot in replace.items]
    scaling = any(slot in scale.items for slot, _ in mix)
    if len(replacing) == 1 and replacing[0][1] == 1 and not scaling:
        replace.overwrite(x, y, base.bias, replacing[0][0])
        return
    plain = base(x).float() if scaling else y.clone()
    for entry in replacing:
        replace.apply(x, y, plain, base.bias, entry)
