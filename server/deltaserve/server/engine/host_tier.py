"""HostTier: adapters that had to leave the device, packed, in the host's memory: what is taken up
again from there need not be read, lowered and packed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Kept(Generic[T]):
    item: T
    nbytes: int
    value: float


class HostTier(Generic[T]):
    """budget: bytes of all of them together. What is worth least goes first, by the measure of
    `memory.Ledger`: uses by the seconds that a load takes, per byte, above a clock that rises to
    the value of what went. gone: called with the key of what is not here any more. Used by the
    engine thread alone."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.gone: Callable[[Hashable], None] = lambda key: None
        self.used = 0
        self.evictions = 0
        self._clock = 0.0
        self._kept: dict[Hashable, _Kept[T]] = {}

    def keep(self, key: Hashable, item: T, nbytes: int, *, uses: int, seconds: float) -> bool:
        """Whether it is kept: not, if it is worth less than what would have to go for it."""
        self.forget(key)
        value = self._clock + max(uses, 1) * seconds / max(nbytes, 1)
        free, going = self.budget - self.used, []
        for other, kept in sorted(self._kept.items(), key=lambda pair: pair[1].value):
            if free >= nbytes or kept.value > value:
                break
            going.append(other)
            free += kept.nbytes
        if free < nbytes:
            return False
        for other in going:
            self._clock = max(self._clock, self._kept[other].value)
            self.forget(other)
            self.evictions += 1
        self._kept[key] = _Kept(item, nbytes, value)
        self.used += nbytes
        return True

    def take(self, key: Hashable) -> T | None:
        """It, if it is here, and no more from now on."""
        kept = self._kept.get(key)
        self.forget(key)
        return None if kept is None else kept.item

    def forget(self, key: Hashable) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.used -= kept.nbytes
            self.gone(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def check_integrity(self) -> None:
        """Raise if bytes are counted wrongly."""
        held = sum(kept.nbytes for kept in self._kept.values())
        if held != self.used or held > self.budget:
            raise AssertionError(f"{held} bytes kept, {self.used} counted, {self.budget} allowed")
