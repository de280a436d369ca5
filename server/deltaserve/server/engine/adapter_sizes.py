"""What adapters of common kinds take in memory on a base, found by packing one of each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from deltaserve.kernels.backend import Layout
from deltaserve.kernels.primitives import Bias, Bit, LowRank, Primitive, Scale
from deltaserve.kernels.table import Group

Groups: TypeAlias = Mapping[tuple[Group, tuple[bool, ...]], int]
"""The linears that adapters act on, lm_head left out: each group, which of its parts have a bias,
and how many there are of it."""

Make: TypeAlias = Callable[[int, int, bool], tuple[Primitive, ...]]
"""out, in, whether there is a bias -> the primitives of one linear."""


def _lora(rank: int) -> Make:
    return lambda out, width, bias: (LowRank(torch.zeros(rank, width), torch.zeros(out, rank)),)


def _dora(out: int, width: int, bias: bool) -> tuple[Primitive, ...]:
    return (*_lora(16)(out, width, bias), Scale(output=torch.zeros(out)))


def _bit(out: int, width: int, bias: bool) -> tuple[Primitive, ...]:
    signs = torch.zeros(1, out, -(-width // 8), dtype=torch.uint8)
    return (Bit(signs, torch.zeros(1, out)),)


def _ia3(out: int, width: int, bias: bool) -> tuple[Primitive, ...]:
    scale = (Scale(output=torch.zeros(out)),)
    return (*scale, Bias(torch.zeros(out))) if bias else scale


KINDS: dict[str, Make] = {
    "LoRA r16": _lora(16),
    "LoRA r64": _lora(64),
    "DoRA r16": _dora,
    "BitDelta": _bit,
    "IA3": _ia3,
}
"""Each kind is taken to be on all of `Groups`."""


def adapter_sizes(groups: Groups, backend: Layout) -> dict[str, int]:
    """Bytes of one adapter of each kind, as the backend would hold it."""
    sizes = dict.fromkeys(KINDS, 0)
    for (group, biased), count in groups.items():
        width, sized = group.in_features, list(enumerate(group.out_features))
        for kind, make in KINDS.items():
            parts = {i: make(out, width, biased[i]) for i, out in sized}
            sizes[kind] += count * backend.packed(parts, group).nbytes
    return sizes
