"""Which adapters are loaded for the requests that wait, and what those loads must not cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from deltaserve.server.engine.core import AdapterState
from deltaserve.server.engine.loader import Loader
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.residents import Residents

LOOK_AHEAD = 16
"""Adapters that a step asks after, whether there is room: each takes time."""


def to_load(
    waiting: Sequence[Sequence[Residency]],
    head: Sequence[Residency],
    loader: Loader,
    residents: Residents,
) -> Iterator[Residency]:
    """What is to be loaded now for waiting requests (their adapters, in the order in which they
    will be served), also for those behind one that finds no room. head: the first whose adapters
    are not all there; it may have those of the others evicted. What was loaded and finds no room
    keeps its memory, so while much has, nothing is loaded but for the head. Each is to be begun
    before the next is asked for."""
    looked_at: set[Residency] = set()
    for wanted in waiting:
        if wanted is not head and len(loader.arrived) >= loader.loaders:
            return
        for residency in wanted:
            if loader.busy or len(looked_at) >= LOOK_AHEAD:
                return
            if residency.ready or residency.loading or residency in looked_at:
                continue
            if residency.state is AdapterState.FAILED:
                continue
            looked_at.add(residency)
            residency.crowded = not residents.could_fit(residency, greedy=wanted is head)
            if not residency.crowded:
                yield residency


def needed_up_to(
    residency: Residency, waiting: Sequence[Sequence[Residency]]
) -> Collection[Residency]:
    """What the first request that waits for it, and those served before that one, need; nothing
    if none waits for it."""
    needed: set[Residency] = set()
    for wanted in waiting:
        needed.update(wanted)
        if residency in wanted:
            return needed
    return ()
