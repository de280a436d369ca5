"""The embedding's kernel against its meaning in float64, for the test before a server is ready."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.embedding import GpuEmbeddingDeltas
from deltaserve.kernels.primitives import LowRank, Primitive, Replace, ReplaceRows, SparseCols
from deltaserve.kernels.segments import Mix, Segments

HIDDEN = 256


def results(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, as found, as expected in float64): rows that are replaced, in part too, and changed,
    some of them of a few tokens alone."""
    vocabulary, few = 100, torch.randperm(100)[:37]
    weight, other = (torch.randn(vocabulary, HIDDEN).to(dtype) for _ in range(2))
    deltas = GpuEmbeddingDeltas(vocabulary, HIDDEN, dtype, Arena(device))
    a, b = torch.randn(5, vocabulary), torch.randn(HIDDEN, 5)
    kinds: tuple[Primitive, ...] = (
        Replace(other), ReplaceRows(few, other[few]), SparseCols(few, other[few].T), LowRank(a, b)
    )  # fmt: skip
    for slot, primitive in enumerate(kinds):
        deltas.install(slot, deltas.prepare((primitive,)))
    mixes: list[Mix] = [((0, 1.0),), ((1, 1.0),), ((1, 0.5), (0, 0.25)), ((2, 2.0),), ((3, 1.0),)]
    ids = torch.randint(vocabulary, (30 * len(mixes),))
    segments = Segments([(30 * i, 30 * i + 30, mix) for i, mix in enumerate(mixes)], len(ids))
    y = deltas.forward(ids.to(device), weight[ids].to(device), weight.to(device), segments)
    wide, new, known = weight.double(), other.double(), torch.zeros(vocabulary, 1)
    known[few] = 1
    low = (b.to(dtype).double() @ a.to(dtype).double()).T
    changes = [new - wide, (new - wide) * known, new * known, low]
    for (start, end, mix), what in zip(
        segments.runs, ("all rows", "some rows", "a mix", "changed rows", "low rank"), strict=True
    ):
        expected = wide + sum(strength * changes[slot] for slot, strength in mix)
        yield what, y[start:end], expected[ids[start:end]]
