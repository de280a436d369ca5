"""What the cache's blocks are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deltaserve.server.engine.memory import Ledger

Moves = Sequence[tuple[int, int]]
"""(block, where its content goes)"""


class Boundary(Protocol):
    """Memory that has its blocks side by side from the start on, and something else above."""

    @property
    def reach(self) -> int:
        """Blocks that there can be at most, as long as some of what is above must stay."""
        ...

    def extend(self, blocks: int) -> bool:
        """There are so many from now on, the new ones zeros. False, and nothing changes, if what
        lies there cannot be moved now."""
        ...

    def shrink(self, blocks: int, moves: Moves) -> None:
        """Once contents have moved, there are so many."""
        ...

    def check(self, blocks: int) -> None:
        """Raise if there are not so many, or they are not theirs alone."""
        ...


def moves_below(there: int, holes: Iterable[int], empty: Iterable[int]) -> tuple[Moves, list[int]]:
    """-> the fewest moves after which the blocks but for the holes are the first ones, and the
    holes among those that are left. empty: blocks that need not be moved."""
    gone = set(holes)
    after = there - len(gone)
    gaps = sorted(hole for hole in gone if hole < after)
    gone.update(empty)
    staying = [block for block in range(after, there) if block not in gone]
    return list(zip(staying, gaps, strict=False)), gaps[len(staying) :]


@dataclass(slots=True)
class BlockMemory:
    """extent: blocks that take and give back their memory together, `extent_bytes` of it. drop:
    zeroes the blocks of these extents and gives their memory back, wherever they are; where there
    is a boundary instead, extents are one block. token_seconds: to compute a token of a prompt, as
    measured."""

    ledger: Ledger
    extent: int
    extent_bytes: int
    drop: Callable[[int], None] = lambda extent: None
    token_seconds: float = 1e-3
    boundary: Boundary | None = None
    _seen: tuple[float, float] = (0.0, 0.0)

    def computed(self, tokens: int, seconds: float) -> None:
        """A step with parts of prompts took so long; later steps count for more."""
        total, elapsed = (0.95 * value for value in self._seen)
        self._seen = total + tokens, elapsed + seconds
        self.token_seconds = self._seen[1] / self._seen[0]
