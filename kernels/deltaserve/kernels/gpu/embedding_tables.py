"""EmbeddingPlan: what a step's adapters do to the token embedding, at addresses that a captured
graph may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from deltaserve.kernels.gpu.prepared_embedding import Item
from deltaserve.kernels.gpu.static import ALIGN
from deltaserve.kernels.gpu.step import StepTooLarge
from deltaserve.kernels.segments import Mix

FIELDS = 5
"""Numbers of an item that embedding_kernel reads."""


@dataclass(eq=False, slots=True)
class EmbeddingTable:
    """A step's mixes that change the embedding. rows: mix -> its number, from 1; runs: (first
    token, end, number). bounds: of each mix its items. items: where they lie now; factors: of each,
    strength times scale."""

    rows: dict[Mix, int] = field(default_factory=dict)
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0, 0])
    items: list[Item] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def add(self, mix: Mix, own: Sequence[tuple[Item, float]]) -> None:
        self.rows[mix] = len(self.rows) + 1
        self.items += [item for item, _ in own]
        self.factors += [factor for _, factor in own]
        self.bounds.append(len(self.items))


@dataclass(frozen=True, slots=True)
class EmbeddingRoom:
    """Of a plan: tokens, each with a mix of its own; items of all mixes."""

    tokens: int
    items: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of mixes, bounds, items and factors, each from a multiple of 16 bytes on, which the
        kernel is compiled for."""
        room = max(1, self.items)
        sizes = (self.tokens, self.tokens + 2, FIELDS * room, room)
        starts = accumulate((size + -size % ALIGN for size in sizes), initial=0)
        return tuple(slice(at, at + size) for at, size in zip(starts, sizes, strict=False))

    @property
    def count(self) -> int:
        """Numbers of 32 bits in all."""
        return int(self.slices[-1].stop)


class EmbeddingPlan:
    """What embedding_kernel is given: mixes, bounds, items, factors, as it takes them. buffer:
    int32, on the device; staging: the same in host memory, for the owner of both to send."""

    def __init__(self, room: EmbeddingRoom, staging: Tensor, buffer: Tensor) -> None:
        self.room, self.staging, self.buffer = room, staging, buffer
        mixes, bounds, items, factors = room.slices
        self.mixes, self.bounds, self.items = buffer[mixes], buffer[bounds], buffer[items]
        self.factors = buffer.view(torch.float32)[factors]

    def on(self, staging: Tensor) -> EmbeddingPlan:
        """The same on the device, filled from another place."""
        return EmbeddingPlan(self.room, staging, self.buffer)

    def write(self, table: EmbeddingTable) -> None:
        """Replaces what is in host memory. Raises StepTooLarge, and then it is as it was."""
        tokens = max((end for _, end, _ in table.runs), default=0)
        for what, needed, there in (
            ("tokens", tokens, self.room.tokens),
            ("items", len(table.items), self.room.items),
        ):
            if needed > there:
                raise StepTooLarge(f"embedding: the step has {needed} {what}, room for {there}")
        staging = self.staging.numpy()
        mixes, bounds, items, factors = (staging[own] for own in self.room.slices)
        mixes[:] = 0
        for first, end, row in table.runs:
            mixes[first:end] = row
        bounds[: len(table.bounds)] = table.bounds
        words = [n for i in table.items for n in (i.kind, i.count, i.index, i.rows, i.matrix)]
        items[: len(words)] = words
        factors[: len(table.factors)].view(np.float32)[:] = table.factors
