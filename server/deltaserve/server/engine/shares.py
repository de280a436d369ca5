"""Shares: the memory that several adapters hold between them, each piece of it counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)
Memory = Mapping[Hashable, int]
"""Pieces of memory (tensors), by what they are known by, and their bytes."""


class Shares(Generic[H]):
    """Holders (adapters) and the memory of each. used: bytes of all of them together."""

    def __init__(self) -> None:
        self.used = 0
        self._memory: dict[H, Memory] = {}
        self._holders: dict[Hashable, set[H]] = {}
        self._shared: dict[Hashable, int] = {}  # bytes of what has several holders
        self._alone: dict[H, int] = {}  # bytes that the holder shares with nobody

    def add(self, holder: H, memory: Memory) -> None:
        self._memory[holder] = memory
        self._alone[holder] = 0
        for key, size in memory.items():
            holders = self._holders.setdefault(key, set())
            holders.add(holder)
            if len(holders) == 1:
                self.used += size
                self._alone[holder] += size
            elif len(holders) == 2:
                (other,) = holders - {holder}
                self._alone[other] -= size
                self._shared[key] = size

    def remove(self, holder: H) -> None:
        del self._alone[holder]
        for key, size in self._memory.pop(holder).items():
            holders = self._holders[key]
            holders.remove(holder)
            if not holders:
                del self._holders[key]
                self.used -= size
            elif len(holders) == 1:
                (other,) = holders
                self._alone[other] += size
                del self._shared[key]

    def holds(self, key: Hashable) -> bool:
        """Whether anybody does."""
        return key in self._holders

    def holders(self, key: Hashable) -> Collection[H]:
        return self._holders[key]

    def alone(self, holder: H) -> int:
        """Bytes that are free once only this one goes."""
        return self._alone[holder]

    def added(self, memory: Memory) -> int:
        """Bytes that one more holder of it would add."""
        return sum(size for key, size in memory.items() if key not in self._holders)

    def shared(self, holder: H) -> dict[Hashable, int]:
        """What others hold as well."""
        return {key: size for key, size in self._memory[holder].items() if key in self._shared}

    def freed(self, going: Collection[H], keep: Iterable[Hashable] = ()) -> int:
        """Bytes that are free once all of these go, and somebody comes who holds `keep`."""
        gone = set(going)
        freed = sum(self._alone[holder] for holder in gone)
        freed += sum(n for key, n in self._shared.items() if self._holders[key] <= gone)
        for key in keep:
            holders = self._holders.get(key)
            if holders and holders <= gone:
                freed -= self._memory[next(iter(holders))][key]
        return freed

    def freed_one_by_one(self, going: Iterable[H]) -> list[int]:
        """Bytes that become free as each of them goes after those before it."""
        if not self._shared:
            return [self._alone[holder] for holder in going]
        left = {key: len(self._holders[key]) for key in self._shared}
        freed = []
        for holder in going:
            common = [key for key in self._memory[holder] if key in left]
            for key in common:
                left[key] -= 1
            last = sum(self._shared[key] for key in common if not left[key])
            freed.append(self._alone[holder] + last)
        return freed

    def check_integrity(self) -> None:
        """Raise if the counts are not those of the memory."""
        pieces = {key: n for memory in self._memory.values() for key, n in memory.items()}
        if self.used != sum(pieces.values()):
            raise AssertionError(f"{sum(pieces.values())} bytes held, {self.used} counted")
        if self._shared != {k: pieces[k] for k, h in self._holders.items() if len(h) > 1}:
            raise AssertionError("what is shared is not what has several holders")
        counts = Counter(key for memory in self._memory.values() for key in memory)
        for holder, memory in self._memory.items():
            if self._alone[holder] != sum(n for key, n in memory.items() if counts[key] == 1):
                raise AssertionError(f"{holder}: wrong bytes of its own")
