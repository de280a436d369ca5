"""Ledger: the bytes of one memory tier, which cache blocks and adapters share, and who goes first.

What may go is compared by one value, that of GreedyDual-Size-Frequency (Cherkasova, "Improving WWW
Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HPL-98-69):

    value = clock + uses * seconds it takes to get it back / bytes

The clock rises to the value of whatever was evicted, so what is not used any more sinks below what
comes in. Getting an adapter back takes its measured load, a cached block the computation of its
tokens. Used by the engine thread alone; the counts may be read from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Offer:
    """Something idle that can be evicted. nbytes: what that frees once all that are offered before
    it have gone. wanted: waiting requests ask for it, so it goes after everything else. adapter:
    it is one, not blocks."""

    value: float
    nbytes: int
    evict: Callable[[], None]
    wanted: bool = False
    adapter: bool = False


Offers = Sequence[Offer]


class Ledger:
    """budget: bytes of cache blocks and adapters together. kv_floor: what adapters never take, so
    that a sequence of the greatest length can always run. adapter_cap: most that adapters may take.

    kv, adapters: bytes taken. claimed: of blocks, that a combination which runs may need, being
    more than one sequence; a floor like the other. promised: bytes that an adapter has waited for
    too long; as much cache as is above the floors makes way for it. idle_blocks, idle_adapters:
    what could go, the least valuable first; of adapters only those that no request waits for, which
    unused_adapters has as well. idle_block_bytes: of all those blocks. settle: to be called when
    enough has gone, and before what comes takes its place.
    """

    def __init__(self, budget: int, *, kv_floor: int = 0, adapter_cap: int | None = None) -> None:
        self.budget = budget
        self.kv_floor = kv_floor
        self.kv = 0
        self.adapters = 0
        self.claimed = 0
        self.promised = 0
        self.clock = 0.0
        self.idle_blocks: Callable[[], Offers] = tuple
        self.idle_block_bytes: Callable[[], int] = self._offered_block_bytes
        self.settle: Callable[[], None] = lambda: None
        self.idle_adapters: Callable[[], Offers] = tuple
        self.unused_adapters: Callable[[], Offers] = tuple
        self._adapter_cap = adapter_cap

    @property
    def free(self) -> int:
        """Bytes that nobody has taken."""
        return self.budget - self.kv - self.adapters

    @property
    def adapter_most(self) -> int:
        """Bytes that adapters may take at most, with no cached block beyond the floor."""
        most = self.budget - self.kv_floor
        return most if self._adapter_cap is None else min(most, self._adapter_cap)

    @property
    def adapter_room(self) -> int:
        """Bytes that adapters may take now."""
        return min(self.adapter_most, self.budget - self.claimed)

    @property
    def kv_ceiling(self) -> int:
        """Bytes of blocks that sequences may use now."""
        if not self.promised:
            return self.budget
        stay = self.adapters - self._idle_bytes()
        return max(self.kv_floor, self.claimed, self.budget - stay - self.promised)

    def claim(self, nbytes: int) -> bool:
        """Be sure that blocks can have so much, evicting adapters that nobody runs, also those that
        waiting requests want. False, and nobody goes, if running ones are in the way."""
        offers = self.unused_adapters()
        if self.adapters - sum(o.nbytes for o in offers) > self.budget - nbytes:
            return False
        for offer in offers:
            if self.adapters <= self.budget - nbytes:
                break
            self.evict(offer)
        if self.adapters > self.budget - nbytes:  # one was pinned meanwhile
            return False
        self.claimed = max(self.claimed, nbytes)
        return True

    def value(self, uses: int, seconds: float, nbytes: int) -> float:
        """Of something used now. seconds: to get it back."""
        return self.clock + max(uses, 1) * seconds / max(nbytes, 1)

    def kv_room(self) -> int:
        """Bytes that `take_kv` can still give."""
        return max(0, min(self.free + self._idle_bytes(), self.kv_ceiling - self.kv))

    def take_kv(self, nbytes: int, worth: float = inf) -> bool:
        """Take bytes for cache blocks, evicting idle adapters of less value than `worth` if need
        be. False, and nobody goes, if there is no room."""
        if self.kv + nbytes > self.kv_ceiling:
            return False
        if self.free < nbytes:
            offers = [o for o in self.idle_adapters() if o.value < worth]
            if self.free + sum(o.nbytes for o in offers) < nbytes:
                return False
            for offer in offers:
                self.evict(offer)
                if self.free >= nbytes:
                    break
            else:  # one was pinned meanwhile
                return False
        self.kv += nbytes
        return True

    def _offered_block_bytes(self) -> int:
        return sum(offer.nbytes for offer in self.idle_blocks())

    def _idle_bytes(self) -> int:
        return sum(offer.nbytes for offer in self.idle_adapters())

    def evict(self, offer: Offer) -> None:
        """Let it go; what comes in from now on is worth more than it was."""
        self.clock = max(self.clock, offer.value)
        offer.evict()

    def check_integrity(self) -> None:
        """Raise if more is taken than there is."""
        if self.kv < 0 or self.adapters < 0 or self.free < 0:
            raise AssertionError(
                f"{self.kv} bytes of blocks and {self.adapters} of adapters in {self.budget}"
            )
        if self.adapters > self.adapter_room:
            raise AssertionError(f"{self.adapters} bytes of adapters, above {self.adapter_room}")
