"""What a step must give: the formula of `deltaserve.kernels.primitives`, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltaserve.kernels.primitives import (
    Bias,
    Primitive,
    Replace,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseRows,
)
from deltaserve.kernels.segments import Segments
from gpu_kernels.data import Adapter, primitive_delta
from gpu_kernels.shapes import Group


def served(
    group: Group,
    x: Tensor,
    weight: Tensor,
    slots: dict[int, Adapter],
    segments: Segments,
    read: Callable[[Tensor], Tensor] = Tensor.double,
) -> Tensor:
    """float64 [tokens, out_features]. weight: [out_features, in_features], as the base holds it.
    read: what the base's product makes of its inputs."""
    x, weight = x.double(), weight.double()
    y = read(x) @ weight.T
    for start, end, mix in segments.runs:
        rows, first = slice(start, end), 0
        for part, out in enumerate(group.parts):
            columns = slice(first, first + out)
            adapters = [(slots[s].get(part, ()), w) for s, w in mix if s in slots]
            y[rows, columns] = _part(x[rows], weight[columns], adapters, read)
            first += out
    return y


def _part(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[tuple[Sequence[Primitive], float]],
    read: Callable[[Tensor], Tensor],
) -> Tensor:
    """One module for the tokens of one mix: the base's product with its factors, and the rest."""
    inputs, outputs = x.new_ones(x.shape[1]), x.new_ones(len(weight))
    y = x.new_zeros(len(x), len(weight))
    for primitives, w in adapters:
        for p in primitives:
            if isinstance(p, Scale):
                if p.input is not None:
                    inputs = inputs * (1 + w * (p.input.to(x.device).double() - 1))
                if p.output is not None:
                    outputs = outputs * (1 + w * (p.output.to(x.device).double() - 1))
            elif isinstance(p, Replace):
                y += w * (x @ p.weight.to(x.device).double().T - read(x) @ weight.T)
            else:
                y += w * _delta(p, x, len(weight))
    return y + outputs * (read(inputs * x) @ weight.T)


def _delta(p: Primitive, x: Tensor, out: int) -> Tensor:
    if isinstance(p, Bias):
        return p.bias.to(x.device).double()[None]
    if isinstance(p, SparseRows | SparseCols | SparseBlocks):
        return x @ _dense(p, x.new_zeros(out, x.shape[1])).T
    return primitive_delta(p, x, out)


def _dense(p: SparseRows | SparseCols | SparseBlocks, full: Tensor) -> Tensor:
    index, values = p.index.to(full.device), p.values.to(full.device).double()
    if isinstance(p, SparseRows):
        full[index] = values
    elif isinstance(p, SparseCols):
        full[:, index] = values
    else:
        height, width = values.shape[1:]
        blocks = full.view(len(full) // height, height, full.shape[1] // width, width)
        blocks.transpose(1, 2)[index[:, 0], index[:, 1]] = values
    return full


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The larger of two: of the whole, by the 2-norm; and of the worst element, against eight times
    the root mean square of its row, which one element that is wrong cannot hide from. nan if
    anything is not finite."""
    off = got.double() - expected
    if not bool(torch.isfinite(off).all()):
        return float("nan")
    squares = expected.square()
    rows = squares.mean(1, keepdim=True).clamp_min(0.01 * squares.mean()).sqrt()
    return max(float(off.norm() / expected.norm()), float((off.abs() / rows).max()) / 8)
