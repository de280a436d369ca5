"""FairQueue: whose turn it is.

A flow is what one tenant, or one user of a tenant with several, asks of one adapter. Tenants share
the machine's time equally, and each tenant's flows share its part. As in the virtual token counter
(Sheng et al. 2024, "Fairness in Serving Large Language Models") a flow has a virtual time, the
seconds that it has been served;
the turn is that of the tenant, then of the flow, with the smallest. A tenant or flow that comes
back is lifted to the smallest among those that wait (start-time fair queueing, Goyal et al. 1996),
so being idle saves nothing up; of equal ones, the turn is that of who has had none for longer.
"""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from deltaserve.server.engine.sequence import Sequence

MAX_FLOWS = 4096
"""Beyond so many, flows without requests are forgotten, and what they were served with them."""


@dataclass(eq=False, slots=True)
class Flow:
    """waiting: priority -> those never admitted yet, in the order they came. members: all that
    wait or run. time: seconds served. turn: number of its last one."""

    tenant: Tenant
    label: str
    time: float = 0.0
    turn: int = 0
    members: int = 0
    waiting: dict[int, OrderedDict[Sequence, None]] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Tenant:
    """now: the virtual time of the flow of its that was admitted last. turn: number of its last
    one."""

    name: str
    time: float = 0.0
    turn: int = 0
    now: float = 0.0
    flows: dict[str, Flow] = field(default_factory=dict)

    @property
    def waiting(self) -> Iterator[Flow]:
        return (f for f in self.flows.values() if f.waiting)


class FairQueue:
    """The requests that wait. Those that ran and were preempted (`returning`) are kept apart, in
    the order in which they were admitted.
    """

    def __init__(self) -> None:
        self.returning: list[Sequence] = []
        self._tenants: dict[str, Tenant] = {}
        self._flow_of: dict[Sequence, Flow] = {}
        self._waiting: dict[Sequence, None] = {}
        self._now = 0.0
        self._turn = 0
        self._flows = 0
        self._most = MAX_FLOWS

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._waiting

    def snapshot(self) -> list[Sequence]:
        """All that wait, in no order; from any thread."""
        return list(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """A new request."""
        flow = self._flow(sequence)
        tenant = flow.tenant
        if not any(tenant.waiting):
            others = (t.time for t in self._tenants.values() if any(t.waiting))
            tenant.time = max(tenant.time, min(others, default=self._now))
        if not flow.waiting:
            flow.time = max(flow.time, min((f.time for f in tenant.waiting), default=tenant.now))
        flow.waiting.setdefault(sequence.level, OrderedDict())[sequence] = None
        flow.members += 1
        self._flow_of[sequence] = flow
        self._waiting[sequence] = None

    def put_back(self, sequence: Sequence) -> None:
        """It was preempted."""
        bisect.insort(self.returning, sequence, key=lambda s: s.place)
        self._waiting[sequence] = None

    def take(self, sequence: Sequence) -> None:
        """It is admitted."""
        flow = self._flow_of[sequence]
        if not sequence.ticketed:
            self._now = max(self._now, flow.tenant.time)
            flow.tenant.now = max(flow.tenant.now, flow.time)
            self._turn += 1
            flow.turn = flow.tenant.turn = self._turn
        self._stop_waiting(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is over, whether it waited or ran."""
        flow = self._flow_of.pop(sequence, None)
        if flow is None:
            return
        self._stop_waiting(sequence, flow)
        flow.members -= 1
        if not self._flow_of:  # nobody is owed anything
            self._tenants.clear()
            self._flows, self._now = 0, 0.0

    def charge(self, sequence: Sequence, seconds: float) -> None:
        """Its flow has been served so long."""
        flow = self._flow_of[sequence]
        flow.time += seconds
        flow.tenant.time += seconds

    def turns(self) -> Turns:
        """The order of those never admitted, followed while they are taken."""
        return Turns(self._entries(), self._entry)

    def absent(self, since: float) -> list[Sequence]:
        """The first of each flow and level whose adapters are not in memory, in the order of their
        turns; before them those that wait since `since`, as if all levels were equal."""
        found = [e for e in self._entries() if not e.head.resident]
        old = sorted((e for e in found if e.head.submitted <= since), key=lambda e: e.key[1:])
        return [entry.head for entry in (*old, *sorted(found, key=_key))]

    def aged(self, since: float) -> list[Sequence]:
        """The first of each flow and level, of those that wait since `since`, in the order of their
        turns as if all levels were equal."""
        old = (e for e in self._entries() if e.head.submitted <= since)
        return [entry.head for entry in sorted(old, key=lambda e: e.key[1:])]

    def lag(self) -> float:
        """Seconds of service between the tenants that wait: the most served and the least."""
        times = [t.time for t in self._tenants.values() if any(t.waiting)]
        return max(times) - min(times) if times else 0.0

    def check_integrity(self) -> None:
        """Raise if a request waits nowhere or twice, or a flow counts wrongly."""
        flows = [f for t in self._tenants.values() for f in t.flows.values()]
        new = [s for f in flows for q in f.waiting.values() for s in q]
        if sorted(map(id, [*new, *self.returning])) != sorted(map(id, self._waiting)):
            raise AssertionError("a request waits nowhere, or twice")
        if any(not q for f in flows for q in f.waiting.values()):
            raise AssertionError("an empty queue is kept")
        if self.returning != sorted(self.returning, key=lambda s: s.place):
            raise AssertionError("the preempted ones are out of order")
        members = sum(f.members for f in flows)
        if members != len(self._flow_of) or len(flows) != self._flows:
            raise AssertionError("a flow counts wrongly")

    def _flow(self, sequence: Sequence) -> Flow:
        name, label = sequence.request.tenant, sequence.flow
        if self._flows >= self._most:
            self._forget()
            self._most = max(MAX_FLOWS, 2 * self._flows)
        tenant = self._tenants.setdefault(name, Tenant(name))
        if label not in tenant.flows:
            tenant.flows[label] = Flow(tenant, label)
            self._flows += 1
        return tenant.flows[label]

    def _forget(self) -> None:
        for tenant in list(self._tenants.values()):
            tenant.flows = {n: f for n, f in tenant.flows.items() if f.members}
            if not tenant.flows:
                del self._tenants[tenant.name]
        self._flows = sum(len(t.flows) for t in self._tenants.values())

    def _stop_waiting(self, sequence: Sequence, flow: Flow | None = None) -> None:
        if sequence not in self._waiting:
            return
        del self._waiting[sequence]
        if sequence.ticketed:
            self.returning.remove(sequence)
            return
        flow = flow or self._flow_of[sequence]
        queue = flow.waiting[sequence.level]
        del queue[sequence]
        if not queue:
            del flow.waiting[sequence.level]

    def _entries(self) -> list[Entry]:
        return [
            self._entry(flow, level)
            for tenant in self._tenants.values()
            for flow in tenant.waiting
            for level in flow.waiting
        ]

    def _entry(self, flow: Flow, level: int) -> Entry:
        queue = flow.waiting[level]
        head = next((s for s in queue if not s.early), None) or next(iter(queue))
        tenant = flow.tenant
        key = (-level, tenant.time, tenant.turn, flow.time, flow.turn, head.arrival)
        return Entry(key, flow, level, head)


class Entry(NamedTuple):
    """The head of one flow's queue of one level. key: the smallest one's turn is next; no two are
    the same."""

    key: tuple[float, ...]
    flow: Flow
    level: int
    head: Sequence


def _key(entry: Entry) -> tuple[float, ...]:
    return entry.key


class Turns:
    """A heap of the queues' heads. Times and arrivals only grow while it is used, so a key that is
    out of date is too small, and is put right when it comes up."""

    def __init__(self, entries: list[Entry], fresh: Callable[[Flow, int], Entry]) -> None:
        self._heap = entries
        self._fresh = fresh
        heapq.heapify(entries)

    def peek(self) -> Sequence | None:
        """Whose turn it is."""
        while self._heap:
            top = self._heap[0]
            if top.level not in top.flow.waiting:
                heapq.heappop(self._heap)
                continue
            fresh = self._fresh(top.flow, top.level)
            if fresh.key == top.key:
                return top.head
            heapq.heapreplace(self._heap, fresh)
        return None

    def skip(self) -> None:
        """Pass over that queue."""
        heapq.heappop(self._heap)
