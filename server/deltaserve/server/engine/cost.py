"""What a step costs, in seconds.

A step reads the base's weights once, the weights of each distinct adapter in it once, and works on
each of its tokens:

    seconds = fixed + per_byte * bytes of the distinct adapters + per_token * tokens

The three are fitted to the steps as they are measured. Steps that all have the same adapters do
not tell what is the base's from what is theirs: both are read from one memory, and as far as the
steps say nothing else, at one rate.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from deltaserve.server.engine.residency import Residency
    from deltaserve.server.engine.sequence import Sequence

Array: TypeAlias = npt.NDArray[np.float64]

BANDWIDTH = 20e9
"""Bytes per second read from memory, until steps have been measured."""
FIXED_TOKENS = 16
"""Tokens that take as long as reading the base's weights does, likewise."""
MEMORY = 0.99
"""A step weighs this much less with each later one."""
TRUST = 1e-4
"""How many measured steps the first guess weighs as much as."""
SAME = 0.03
"""How many measured steps it weighs as much as that the base and the adapters are read at one rate,
for a relative difference between the two."""
APART = np.array([1.0, -1.0, 0.0])
LEAST = 1e-3
"""Of its first guess, the least that a coefficient becomes."""


@dataclass(slots=True)
class StepLoad:
    """What a step computes. users: sequences that each distinct adapter is read for."""

    tokens: int = 0
    sequences: set[Sequence] = field(default_factory=set)
    users: Counter[Residency] = field(default_factory=Counter)

    def add(self, sequence: Sequence, tokens: int) -> None:
        """`tokens` more of the sequence."""
        self.tokens += tokens
        if sequence not in self.sequences:
            self.sequences.add(sequence)
            self.users.update(sequence.adapters)

    @property
    def adapter_bytes(self) -> int:
        return sum(a.nbytes for a in self.users)


class CostModel:
    """Least squares of the relative errors, old steps forgotten, no coefficient below nothing.

    Errors are relative to the larger of the measured and the predicted seconds: a step that
    something else held up a hundred times too long hardly counts.

    base_bytes: of the base's weights as they are held.
    """

    def __init__(self, base_bytes: int) -> None:
        fixed = max(base_bytes, 1 << 20) / BANDWIDTH
        self._unit = np.array([fixed, 1 / BANDWIDTH, fixed / FIXED_TOKENS])
        self._factor = np.ones(3)  # on the units
        self._square = TRUST * np.eye(3)  # normal equations
        self._right = TRUST * np.ones(3)

    @property
    def fixed(self) -> float:
        """Seconds of a step of nothing."""
        return float(self._factor[0] * self._unit[0])

    @property
    def per_byte(self) -> float:
        """Seconds per byte of a distinct adapter."""
        return float(self._factor[1] * self._unit[1])

    @property
    def per_token(self) -> float:
        """Seconds per token."""
        return float(self._factor[2] * self._unit[2])

    def seconds(self, tokens: int, adapter_bytes: int) -> float:
        """Of a step of `tokens` that reads `adapter_bytes` of distinct adapters."""
        return self.fixed + self.per_byte * adapter_bytes + self.per_token * tokens

    def tokens_within(self, seconds: float, adapter_bytes: int) -> int:
        """Tokens that a step of so many seconds has time for; negative if it has none."""
        return int((seconds - self.fixed - self.per_byte * adapter_bytes) / self.per_token)

    def charges(self, load: StepLoad, fresh: dict[Sequence, int]) -> dict[Sequence, float]:
        """The step's seconds divided among its sequences: the base's part equally, each adapter's
        among those it is read for, and the tokens. fresh: sequences with what they compute for
        the first time; who only computes again what it had paid for pays nothing."""
        share = self.fixed / max(1, len(load.sequences))
        return {
            sequence: share
            + self.per_token * tokens
            + sum(self.per_byte * a.nbytes / load.users[a] for a in sequence.adapters)
            for sequence, tokens in fresh.items()
        }

    def observe(self, tokens: int, adapter_bytes: int, seconds: float) -> None:
        """A step has taken so long."""
        scale = max(seconds, self.seconds(tokens, adapter_bytes))
        x = self._unit * (1, adapter_bytes, tokens) / scale
        guess = (1 - MEMORY) * TRUST  # it stays where nothing is learnt
        self._square = MEMORY * self._square + np.outer(x, x) + guess * np.eye(3)
        self._right = MEMORY * self._right + x * (seconds / scale) + guess
        apart = APART * 2 / self._factor[:2].sum()
        self._factor = _solve(self._square + SAME * np.outer(apart, apart), self._right)


def _solve(square: Array, right: Array) -> Array:
    """The least squares with nothing below `LEAST`: what falls below is held there, and the
    others are solved for again."""
    found = np.full(3, LEAST)
    free = np.ones(3, dtype=bool)
    while free.any():
        rest = right[free] - square[np.ix_(free, ~free)] @ found[~free]
        found[free] = np.linalg.solve(square[np.ix_(free, free)], rest)
        low = free & (found < LEAST)
        if not low.any():
            break
        found[low] = LEAST
        free &= ~low
    return found
