"""Order: which waiting request is next, and for whom adapters are loaded."""

from __future__ import annotations

from deltaserve.server.engine.fair_queue import FairQueue
from deltaserve.server.engine.sequence import Sequence

PATIENCE = 5.0
"""Seconds after which priorities alone do not make a request wait any more."""
FAIR_TURN = 4
"""One admission in so many is by virtual time alone, for those who have waited so long."""
TOP_LEVEL = 1 << 20
"""Above every priority: the level of those admitted in such a turn."""
ROOM_SECONDS = 1.0
"""So long requests whose adapters are in memory may overtake one whose adapter finds no room."""


class Order:
    """first: a waiting request that is not to be overtaken by any that keeps adapters in memory
    which it does not use itself. crowded: in this step, what holds no adapters waits for one that
    waits for room."""

    def __init__(self, queue: FairQueue) -> None:
        self.first: Sequence | None = None
        self.crowded = False
        self._queue = queue
        self._turns = queue.turns()
        self._now = 0.0
        self._turn = 0  # admissions since one by age

    def begin_step(self, now: float) -> None:
        self.crowded, self._now = False, now
        self._turns = self._queue.turns()

    def wanting(self, now: float) -> list[Sequence]:
        """Waiting requests whose adapters are not resident, one of each kind, in the order in which
        they are to be loaded: those that have waited too long first."""
        returning = [s for s in self._queue.returning if not s.resident]
        found = list(dict.fromkeys([*returning, *self._queue.absent(now - PATIENCE)]))
        self.first = found[0] if found and _crowded_out(found[0], now) else None
        return found

    def next(self) -> Sequence | None:
        """The next one that has never been admitted and can be."""
        while not self.crowded and (sequence := self._turns.peek()) is not None:
            if self._free(sequence):
                return sequence
            self._turns.skip()
        return None

    def returning(self, new: Sequence | None) -> Sequence | None:
        """The first of the preempted ones, unless a new one is of a higher level."""
        for back in self._queue.returning:
            if back.resident and (back.admitted or not self.crowded):
                return back if new is None or back.level >= new.level else None
        return None

    def overdue(self, new: Sequence | None) -> Sequence | None:
        """Who has waited too long while higher levels went before, once in `FAIR_TURN`."""
        if new is None or self._turn < FAIR_TURN - 1:
            return None
        since = self._now - PATIENCE
        back = (s for s in self._queue.returning if s.submitted <= since)
        for sequence in [*back, *self._queue.aged(since)]:
            if self._free(sequence):
                return sequence if sequence.level < new.level else None
        return None

    def entered(self, sequence: Sequence, *, by_age: bool) -> None:
        """It has been admitted. by_age: it was overdue."""
        self._turn = 0 if by_age else self._turn + 1
        if by_age:
            sequence.level = TOP_LEVEL

    def _free(self, sequence: Sequence) -> bool:
        """Nothing but room keeps it from being admitted."""
        return sequence.resident and not sequence.early and not self._overtakes(sequence)

    def _overtakes(self, sequence: Sequence) -> bool:
        first = self.first
        if first is None or sequence.admitted or sequence is first:
            return False
        return any(not a.pinned and a not in first.held for a in sequence.held)


def _crowded_out(sequence: Sequence, now: float) -> bool:
    """Others' adapters have left it no room for too long."""
    return now - sequence.submitted >= ROOM_SECONDS and any(a.crowded for a in sequence.held)
