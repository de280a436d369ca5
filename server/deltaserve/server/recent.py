"""Recent: what the last minutes were like, second by second, for those who look at the server live.

Prometheus' histograms count since the start, in a few wide buckets; these are kept per second, in
eight buckets an octave, so that quantiles of any recent stretch are within 5 %.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

KEPT_SECONDS = 300
WINDOW_SECONDS = 60
MOST_MODELS = 200
"""Told apart in one second; the others are counted as one."""
OTHER = "_other"
_PER_OCTAVE = 8
_LEAST = 1e-5
"""Seconds; what took less is counted as this."""


class Durations:
    """How long things took. One thread adds, others may read."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        at = math.floor(_PER_OCTAVE * math.log2(max(seconds, _LEAST)))
        self.buckets[at] = self.buckets.get(at, 0) + 1
        self.seconds += seconds


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds."""

    p50: float
    p90: float
    p99: float
    mean: float


def quantiles(each: Iterable[Durations]) -> Quantiles | None:
    """Of all of them together; None if nothing was added."""
    total, seconds = Counter[int](), 0.0
    for one in each:
        total.update(one.buckets.copy())
        seconds += one.seconds
    count = total.total()
    if not count:
        return None
    found: list[float] = []
    below = 0
    wanted = [max(1, math.ceil(q * count)) for q in (0.5, 0.9, 0.99)]
    for at in sorted(total):
        below += total[at]
        while len(found) < len(wanted) and wanted[len(found)] <= below:
            found.append(2.0 ** ((at + 0.5) / _PER_OCTAVE))
    p50, p90, p99 = found
    return Quantiles(p50, p90, p99, seconds / count)


@dataclass(slots=True)
class Traffic:
    """Requests for one model."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Second:
    """at: its begin, in seconds of the monotonic clock. models: by the label of an Observer."""

    at: int
    shed: int = 0
    first_token: Durations = field(default_factory=Durations)
    inter_token: Durations = field(default_factory=Durations)
    models: dict[str, Traffic] = field(default_factory=dict)

    def model(self, label: str) -> Traffic:
        found = self.models.get(label)
        if found is None:
            label = label if len(self.models) < MOST_MODELS else OTHER
            found = self.models.setdefault(label, Traffic())
        return found

    def total(self) -> Traffic:
        """Of all models."""
        return total(self.models.copy().values())


def total(each: Iterable[Traffic]) -> Traffic:
    """The sum."""
    found = Traffic()
    for one in each:
        found.requests += one.requests
        found.prompt_tokens += one.prompt_tokens
        found.completion_tokens += one.completion_tokens
    return found


class Recent:
    """Told on the engine thread, but `shed` on any; read on any. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._lock = threading.Lock()
        self._now = Second(math.floor(self._start))
        self._kept: deque[Second] = deque(maxlen=KEPT_SECONDS)

    def first_token(self, seconds: float) -> None:
        self._second().first_token.add(seconds)

    def inter_token(self, seconds: float) -> None:
        self._second().inter_token.add(seconds)

    def tokens(self, label: str, prompt: int, completion: int) -> None:
        traffic = self._second().model(label)
        traffic.prompt_tokens += prompt
        traffic.completion_tokens += completion

    def finished(self, label: str) -> None:
        self._second().model(label).requests += 1

    def shed(self) -> None:
        second = self._second()
        with self._lock:
            second.shed += 1

    @property
    def window(self) -> float:
        """Seconds that `last` is of."""
        return min(float(WINDOW_SECONDS), self._clock() - self._start)

    def last(self) -> list[Second]:
        """The seconds of the window, the one that has just begun included; those in which nothing
        happened are left out."""
        now = self._second()
        return [s for s in (*self._kept, now) if s.at > now.at - WINDOW_SECONDS]

    def history(self, seconds: int) -> list[Second]:
        """The last whole seconds, oldest first, none left out."""
        now = self._second().at
        first = max(now - min(seconds, KEPT_SECONDS), math.floor(self._start))
        kept = {s.at: s for s in list(self._kept)}
        return [kept.get(at) or Second(at) for at in range(first, now)]

    def _second(self) -> Second:
        at, now = math.floor(self._clock()), self._now
        if at <= now.at:
            return now
        with self._lock:
            if at > self._now.at:
                self._kept.append(self._now)
                self._now = Second(at)
            return self._now
