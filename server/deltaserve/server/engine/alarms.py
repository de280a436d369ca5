"""Alarms: which requests have run out of time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.errors import DeadlineExceeded, RequestError


class Alarms:
    """alive: whether a request is not over; what is over is forgotten in time."""

    def __init__(self, alive: Callable[[Sequence], bool]) -> None:
        self._alive = alive
        self._heap: list[tuple[float, int, Sequence]] = []
        self._most = 64

    def add(self, sequence: Sequence) -> None:
        """Watch its deadline and its longest wait."""
        for time in (sequence.request.deadline, _latest_start(sequence)):
            if time is not None:
                heapq.heappush(self._heap, (time, sequence.arrival, sequence))
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if self._alive(entry[2])]
            heapq.heapify(self._heap)
            self._most = max(64, 2 * len(self._heap))

    def due(self, now: float) -> Iterator[tuple[Sequence, RequestError]]:
        """Those whose time is up, and what to tell them."""
        while self._heap and self._heap[0][0] < now:
            _, _, sequence = heapq.heappop(self._heap)
            if not self._alive(sequence):
                continue
            deadline, latest = sequence.request.deadline, _latest_start(sequence)
            if deadline is not None and deadline < now:
                yield sequence, DeadlineExceeded("the request's deadline has passed")
            elif latest is not None and latest < now and not sequence.first_token:
                yield (
                    sequence,
                    DeadlineExceeded(
                        f"max_wait_seconds: no token within {sequence.request.max_wait:g} s",
                        field="max_wait_seconds",
                    ),
                )


def _latest_start(sequence: Sequence) -> float | None:
    most = sequence.request.max_wait
    return None if most is None else sequence.submitted + most
