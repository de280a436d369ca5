"""NormPlan: what a step's adapters do to all norms of a model, at addresses that a captured graph
may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.static import ALIGN
from deltaserve.kernels.gpu.step import StepTooLarge
from deltaserve.kernels.segments import Mix

Listed = tuple[npt.NDArray[np.int32], float]
"""Offsets of a vector, by norm, and its strength."""


@dataclass(eq=False, slots=True)
class NormTable:
    """A step's mixes that tune norms. rows: mix -> its number, from 1; runs: (first token, end,
    number). bounds: of each mix its gains and its biases in `vectors`."""

    rows: dict[Mix, int] = field(default_factory=dict)
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0, 0, 0])
    vectors: list[Listed] = field(default_factory=list)

    def add(self, mix: Mix, gains: Sequence[Listed], biases: Sequence[Listed]) -> None:
        self.rows[mix] = len(self.rows) + 1
        for found in (gains, biases):
            self.vectors += found
            self.bounds.append(len(self.vectors))


@dataclass(frozen=True, slots=True)
class NormRoom:
    """Of a plan: tokens, each with a mix of its own; vectors of all mixes; norms."""

    tokens: int
    vectors: int
    norms: int

    @property
    def stride(self) -> int:
        """From the offsets of one norm to those of the next."""
        return -(-max(1, self.vectors) // ALIGN) * ALIGN

    @property
    def slices(self) -> tuple[slice, ...]:
        """Of mixes, bounds, strengths and offsets."""
        sizes = (self.tokens, 2 * self.tokens + 3, self.stride, self.stride * self.norms)
        starts = accumulate((size + -size % ALIGN for size in sizes), initial=0)
        return tuple(slice(at, at + size) for at, size in zip(starts, sizes, strict=False))

    @property
    def count(self) -> int:
        """Numbers of 32 bits in all."""
        return int(self.slices[-1].stop)


@dataclass(frozen=True, eq=False, slots=True)
class Tuned:
    """What norm_kernel is given of one norm. mixes: int32 [tokens], of each token, 0 for those
    whose norms are the base's. bounds: int32 [2 (mixes + 1) + 1], of each mix its gains and its
    biases in two lists: offsets, int32 in units of 16 bytes of the arena, `NOWHERE` for what the
    norm has not, and strengths, float32."""

    mixes: Tensor
    bounds: Tensor
    offsets: Tensor
    strengths: Tensor
    arena: Arena


class NormPlan:
    """Norms differ in offsets alone. buffer: int32, on the device; staging: the same in host
    memory, for the owner of both to send."""

    def __init__(self, room: NormRoom, staging: Tensor, buffer: Tensor, arena: Arena) -> None:
        self.room, self.staging, self.buffer = room, staging, buffer
        mixes, bounds, strengths, offsets = room.slices
        self._shared = buffer[mixes], buffer[bounds], buffer.view(torch.float32)[strengths]
        self._offsets = buffer[offsets].view(room.norms, room.stride).unbind(0)
        self._arena = arena

    def of(self, norm: int) -> Tuned:
        mixes, bounds, strengths = self._shared
        return Tuned(mixes, bounds, self._offsets[norm], strengths, self._arena)

    def on(self, staging: Tensor) -> NormPlan:
        """The same on the device, filled from another place."""
        return NormPlan(self.room, staging, self.buffer, self._arena)

    def write(self, table: NormTable) -> None:
        """Replaces what is in host memory. Raises StepTooLarge, and then it is as it was."""
        tokens = max((end for _, end, _ in table.runs), default=0)
        for what, needed, there in (
            ("tokens", tokens, self.room.tokens),
            ("vectors", len(table.vectors), self.room.vectors),
        ):
            if needed > there:
                raise StepTooLarge(f"norms: the step has {needed} {what}, and room for {there}")
        staging = self.staging.numpy()
        mixes, bounds, strengths, offsets = (staging[own] for own in self.room.slices)
        mixes[:] = 0
        for first, end, row in table.runs:
            mixes[first:end] = row
        bounds[: len(table.bounds)] = table.bounds
        count = len(table.vectors)
        strengths[:count].view(np.float32)[:] = [w for _, w in table.vectors]
        if count:
            rows = offsets.reshape(self.room.norms, self.room.stride)
            rows[:, :count] = np.array([at for at, _ in table.vectors]).T
