"""The runs of a base product whose adapters scale or replace the base weight."""

from __future__ import annotations

from torch import Tensor

from deltaserve.kernels.base.linear import BaseLinear
from deltaserve.kernels.replace.cpu import ReplaceTable
from deltaserve.kernels.scale.cpu import ScaleTable
from deltaserve.kernels.segments import Mix, Segments


def change(
    x: Tensor,
    y: Tensor,
    base: BaseLinear,
    segments: Segments,
    scale: ScaleTable,
    replace: ReplaceTable,
) -> None:
    """Makes y ``s_out * W (s_in * x) + b`` or ``W' x + b`` of each token, before any delta.

    x: [T, in]. y: float32 [T, out], ``base(scale.scale_inputs(x, segments))``, changed in place.
    """
    if scale.touches(segments):
        for start, end, mix in scale.split_runs(segments):
            _split_inputs(x[start:end], y[start:end], base, mix, scale)
        scale.scale_outputs(y, base.bias, segments)
    if replace.touches(segments):
        for start, end, mix in segments.runs:
            if any(slot in replace.items for slot, _ in mix):
                _replace(x[start:end], y[start:end], base, mix, scale, replace)


def _split_inputs(x: Tensor, y: Tensor, base: BaseLinear, mix: Mix, scale: ScaleTable) -> None:
    """A product of its own for each part that scales its inputs."""
    for part in range(len(scale.group.out_features)):
        factor = scale.input_factor(mix, part)
        if factor is not None:
            columns = scale.group.columns(part)
            y[:, columns] = base((x.float() * factor).to(x.dtype))[:, columns].float()


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
