"""What the erasure of a user took away."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Keys: TypeAlias = Mapping[str, Sequence[int]]
"""By route, the keys that the user has there: its own, and one for each shadow."""


@dataclass(frozen=True, slots=True)
class Erased:
    """counts: (book id, user key) where the user was counted. requests, feedback: how many."""

    counts: Collection[tuple[int, int]] = ()
    requests: int = 0
    feedback: int = 0

    def __add__(self, other: Erased) -> Erased:
        counts = {*self.counts, *other.counts}
        return Erased(counts, self.requests + other.requests, self.feedback + other.feedback)

    def __str__(self) -> str:
        return (
            f"{len(self.counts)} counts, {self.requests} requests, {self.feedback} pieces of "
            "feedback"
        )
