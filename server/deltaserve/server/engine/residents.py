"""Residents: the adapters that are in memory, their slots, and who makes room for whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

from deltaserve.adapters.adapter import Adapter
from deltaserve.server.engine.masks import Chosen
from deltaserve.server.engine.memory import Ledger, Offer
from deltaserve.server.engine.residency import Prepared, Residency, View
from deltaserve.server.engine.shares import Memory, Shares
from deltaserve.server.errors import AdapterTooLarge, InvalidRequest


class Host(Protocol):
    """What holds the published adapters: the model."""

    def prepare(self, adapter: Adapter) -> Any: ...
    def only(self, prepared: Any, modules: Chosen) -> Any: ...
    def install(self, slot: int, prepared: Any) -> None: ...
    def remove(self, slot: int) -> None: ...


Residencies: TypeAlias = list[Residency]

PATIENCE = 1.0
"""Seconds that an adapter waits for cache blocks to become idle before running requests are
preempted for it."""

MOST_SHARED = 16
"""Pieces of memory that an adapter is known to share while it is not in memory."""


class Residents:
    """Changed on the engine thread alone, under `lock`. on_evicting, on_evicted: called before and
    after one has to go. discard: takes what left the model."""

    def __init__(
        self,
        host: Host,
        ledger: Ledger,
        on_evicted: Callable[[Residency], None],
        lock: threading.RLock,
        discard: Callable[[Prepared], None],
        on_evicting: Callable[[Residency], None] = lambda residency: None,
    ) -> None:
        self.ledger = ledger
        self.evictions = 0
        self._host = host
        self._on_evicted = on_evicted
        self._on_evicting = on_evicting
        self._lock = lock
        self._discard = discard
        self._in_slot: dict[int, Residency] = {}
        self._shares: Shares[Residency] = Shares()
        self._offers: Sequence[Offer] | None = None
        self._free_slots: Sequence[int] = ()
        self._next_slot = 1
        self._spoilt: list[int] = []  # the host failed to fill them
        ledger.idle_adapters = self._idle_offers
        ledger.unused_adapters = lambda: self._offered(self._evictable(frozenset()))

    @property
    def used_bytes(self) -> int:
        """Bytes of all of them together; what several share is counted once."""
        return self._shares.used

    def begin_step(self) -> None:
        """Values may have changed."""
        self._offers = None

    def used(self, residency: Residency) -> None:
        """A request wants it: it is worth more."""
        residency.uses += 1
        self._revalue(residency)

    def together(self, wanted: Collection[Residency], also: Memory = MappingProxyType({})) -> int:
        """Bytes of these in memory, as far as it is known what they share."""
        shared = {key: n for r in wanted for key, n in r.shared.items()}
        alone = sum(r.nbytes - sum(r.shared.values()) for r in wanted)
        alone += sum(n for key, n in also.items() if key not in shared)
        return alone + sum(shared.values())

    def check_room(
        self, wanted: Collection[Residency], what: str, also: Memory = MappingProxyType({})
    ) -> None:
        """AdapterTooLarge if `wanted`, and what is in `also`, can never be had beside the pinned
        ones. what: whose they are, with the verb: ``adapter 'a' needs``."""
        with self._lock:
            pinned = [r for r in self._in_slot.values() if r.pinned and r not in wanted]
        need = self.together(wanted, also)
        beside = self.together([*wanted, *pinned], also) - need
        most = self.ledger.adapter_most
        if need + beside > most:
            among = f" beside {beside} bytes of pinned adapters" if beside else ""
            raise AdapterTooLarge(
                f"{what} {need} bytes{among}, the adapter memory is {most} bytes in all",
                field="adapters",
            )

    def check_beside(self, wanted: Collection[Residency], kv: int) -> None:
        """InvalidRequest if `wanted`, pinned ones and so many bytes of blocks are never there at
        once."""
        with self._lock:
            pinned = [r for r in self._in_slot.values() if r.pinned and r not in wanted]
        held = self.together([*wanted, *pinned])
        if held + kv > self.ledger.budget:
            raise InvalidRequest(
                f"combination.members: {len(wanted)} adapters and pinned ones of {held} bytes, and "
                f"{kv} bytes of keys and values; the memory is {self.ledger.budget} bytes in all: "
                "shorten the prompts or max_tokens, or leave out members",
                field="combination.members",
            )

    def could_fit(self, residency: Residency, *, greedy: bool) -> bool:
        """greedy: even at the cost of adapters that other waiting requests want. The request that
        is served next may; so it is served as soon as running ones make room."""
        victims = [v for v in self._evictable(frozenset((residency,))) if greedy or not v.in_flight]
        known = sum(n for key, n in residency.shared.items() if self._shares.holds(key))
        need = residency.nbytes - known
        ledger, freed = self.ledger, self._shares.freed(victims, residency.shared)
        after = self.used_bytes - freed + need
        least = ledger.kv - ledger.idle_block_bytes()
        return after <= ledger.adapter_room and after + least <= ledger.budget

    def make_room(self, prepared: Prepared, protected: frozenset[Residency]) -> bool:
        """Evict adapters and idle blocks until there is room for it, the least valuable first.
        False, and nobody goes, if that cannot be."""
        ledger, shares, memory = self.ledger, self._shares, prepared.memory
        need = shares.added(memory)
        if shares.used + need <= ledger.adapter_room and need <= ledger.free:
            return True
        victims = self._evictable(protected)
        after = shares.used - shares.freed(victims, memory) + need
        least = ledger.kv - ledger.idle_block_bytes()
        if after > ledger.adapter_room or after + least > ledger.budget:
            return False
        try:
            return self._evict_for(memory, victims)
        finally:
            ledger.settle()

    def _evict_for(self, memory: Memory, victims: Residencies) -> bool:
        """Until so much is free. victims: who could go, beside idle blocks."""
        ledger, shares = self.ledger, self._shares
        offers = [*self._offered(victims), *ledger.idle_blocks()]
        pending = sorted(offers, key=lambda offer: (offer.wanted, offer.value))
        while True:
            need = shares.added(memory)
            too_many = shares.used + need > ledger.adapter_room
            if not too_many and need <= ledger.free:
                return True
            going = next((o for o in pending if o.adapter or not too_many), None)
            if going is None:  # one was pinned or wanted meanwhile
                return False
            pending.remove(going)
            ledger.evict(going)

    def promise(self, wanted: Sequence[Residency]) -> None:
        """Have running sequences make way for the first of these that has found no room for long,
        unless it is other adapters that are in its way."""
        ledger, now = self.ledger, time.monotonic()
        ledger.promised = 0
        late = (r for r in wanted if r.crowded and now - r.crowded_since > PATIENCE)
        for residency in late:
            idle = self._shares.freed(self._evictable(frozenset(wanted)))
            if self.used_bytes - idle + residency.nbytes <= ledger.adapter_room:
                ledger.promised = residency.nbytes
                return

    def book(self, residency: Residency, prepared: Prepared) -> None:
        """It is on its way: its bytes are taken, and it is nobody's to evict."""
        self._shares.add(residency, prepared.memory)
        self._changed()

    def unbook(self, residency: Residency) -> None:
        """It does not come after all."""
        self._shares.remove(residency)
        self._changed()

    def put_in(
        self, residency: Residency, prepared: Prepared, seconds: float, *, booked: bool = False
    ) -> None:
        """Publish it in a slot. seconds: its load took. Raises what the host raises, and the slot
        is not used again."""
        slot = self._install(prepared)
        residency.slot, residency.nbytes = slot, prepared.nbytes
        residency.prepared, residency.load_seconds = prepared, seconds
        self._in_slot[slot] = residency
        if not booked:
            self._shares.add(residency, prepared.memory)
        self._note_shares(residency)
        self._revalue(residency)
        self._changed()

    def take_out(self, residency: Residency) -> int:
        """-> bytes freed: what nobody else holds."""
        assert not residency.views, "requests use some of its modules"
        freed = self._shares.alone(residency)
        del self._in_slot[residency.slot]
        self._shares.remove(residency)
        self._remove(residency.slot)
        self._changed()
        residency.slot = residency.uses = 0
        self._discard(residency.prepared)
        residency.structure = residency.prefix = residency.prepared = None
        return freed

    def clear(self) -> None:
        """Take out all of them."""
        for residency in list(self._in_slot.values()):
            self.take_out(residency)

    def enter(self, residency: Residency, chosen: Chosen) -> int:
        """The slot that a request uses until it calls `leave`: the adapter's own, or one with the
        chosen modules alone. That one shares the adapter's tensors and takes no bytes of its own.
        """
        if not chosen:
            return residency.slot
        view = residency.views.get(chosen)
        if view is None:
            view = View(self._install(self._host.only(residency.prepared, chosen)))
            residency.views[chosen] = view
        view.users += 1
        return view.slot

    def leave(self, residency: Residency, chosen: Chosen) -> None:
        """Undo one `enter`."""
        if not chosen:
            return
        view = residency.views[chosen]
        view.users -= 1
        if not view.users:
            del residency.views[chosen]
            self._remove(view.slot)

    def _install(self, prepared: Any) -> int:
        slot, *self._free_slots = self._free_slots or [self._next_slot]
        self._next_slot = max(self._next_slot, slot + 1)
        self._spoilt.append(slot)
        self._host.install(slot, prepared)
        self._spoilt.pop()
        return slot

    def _remove(self, slot: int) -> None:
        self._host.remove(slot)
        self._free_slots = [slot, *self._free_slots]

    def check_integrity(self) -> None:
        """Raise if bytes, slots or views are lost or counted twice."""
        self._shares.check_integrity()
        self.ledger.check_integrity()
        held = list(self._in_slot.values())
        if self.ledger.adapters != self._shares.used:
            raise AssertionError(f"{self.ledger.adapters} bytes booked, {self._shares.used} held")
        if any(r.slot != slot for slot, r in self._in_slot.items()):
            raise AssertionError("an adapter is in a slot that is not its own")
        views = [v.slot for r in held for v in r.views.values()]
        taken = [*self._in_slot, *views, *self._free_slots, *self._spoilt]
        if sorted(taken) != list(range(1, self._next_slot)):
            raise AssertionError(f"slots {sorted(taken)} of {self._next_slot - 1}")

    def _evictable(self, protected: frozenset[Residency]) -> Residencies:
        """Who could go, first the one least worth keeping."""
        held = self._in_slot.values()
        idle = [r for r in held if not r.running and not r.pinned and r not in protected]
        return sorted(idle, key=lambda r: (r.in_flight > 0, r.value, r.last_used))

    def _idle_offers(self) -> Sequence[Offer]:
        """Those that no request wants."""
        if self._offers is None:
            with self._lock:
                idle = [r for r in self._evictable(frozenset()) if not r.in_flight]
                self._offers = self._offered(idle)
        return self._offers

    def _offered(self, victims: Residencies) -> list[Offer]:
        """In the order in which they would go."""
        freed = self._shares.freed_one_by_one(victims)
        return [
            Offer(r.value, n, partial(self._evict, r), r.in_flight > 0, adapter=True)
            for r, n in zip(victims, freed, strict=True)
        ]

    def _evict(self, residency: Residency) -> None:
        with self._lock:
            if not residency.ready or residency.running or residency.pinned:
                return  # pinned since it was offered
            self._on_evicting(residency)
            self.take_out(residency)
            self.evictions += 1
            self._on_evicted(residency)

    def _revalue(self, residency: Residency) -> None:
        residency.value = self.ledger.value(
            residency.uses, residency.load_seconds, residency.nbytes
        )

    def _note_shares(self, residency: Residency) -> None:
        """It and its sharers know what they have in common, when they are out of memory too."""
        for key, size in self._shares.shared(residency).items():
            for r in self._shares.holders(key):
                if len(r.shared) < MOST_SHARED:
                    r.shared[key] = size

    def _changed(self) -> None:
        self.ledger.adapters = self._shares.used
        self._offers = None
