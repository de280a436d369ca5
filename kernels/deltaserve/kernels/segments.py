"""Segments: which tokens of a step belong to which adapters. Built once, read by every layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Mix: TypeAlias = tuple[tuple[int, float], ...]
"""The adapters of one request: (slot, strength) pairs in the order given; empty for the base."""


class Segments:
    """The runs of neighbouring tokens that have the same mix; tokens of the base have no run.

    runs: (start, end, mix) with ``start < end``, ascending, disjoint, mix not empty.
    tokens: number of tokens of the step, base ones included.

    A run with k adapters becomes k entries of the flat arrays `start`, `end`, `slot` (int32) and
    `strength` (float32), so additive kernels loop over entries and need not know of mixes.

    plans: what a backend has made of them, by what it is for.
    """

    def __init__(self, runs: Sequence[tuple[int, int, Mix]], tokens: int) -> None:
        self.runs = tuple(runs)
        self.tokens = tokens
        self.plans: dict[Hashable, Any] = {}
        flat = [(s, e, slot, w) for s, e, mix in self.runs for slot, w in mix]
        self.slots = frozenset(slot for _, _, slot, _ in flat)
        self.start: npt.NDArray[np.int32] = np.array([f[0] for f in flat], dtype=np.int32)
        self.end: npt.NDArray[np.int32] = np.array([f[1] for f in flat], dtype=np.int32)
        self.slot: npt.NDArray[np.int32] = np.array([f[2] for f in flat], dtype=np.int32)
        self.strength: npt.NDArray[np.float32] = np.array([f[3] for f in flat], dtype=np.float32)

    @classmethod
    def of(cls, mixes: Sequence[Mix]) -> Segments:
        """From the mix of each token, in order; equal neighbours share a run."""
        runs: list[tuple[int, int, Mix]] = []
        for i, mix in enumerate(mixes):
            if not mix:
                continue
            if runs and runs[-1][1] == i and runs[-1][2] == mix:
                runs[-1] = (runs[-1][0], i + 1, mix)
            else:
                runs.append((i, i + 1, mix))
        return cls(runs, len(mixes))

    def __bool__(self) -> bool:
        return bool(self.runs)

    def __len__(self) -> int:
        """Number of (run, adapter) entries."""
        return len(self.slot)

    @cached_property
    def entries(self) -> tuple[tuple[int, int, int, float], ...]:
        """(start, end, slot, strength) of every entry, as Python numbers."""
        return tuple(
            zip(
                self.start.tolist(),
                self.end.tolist(),
                self.slot.tolist(),
                self.strength.tolist(),
                strict=True,
            )
        )


EMPTY = Segments((), 0)
