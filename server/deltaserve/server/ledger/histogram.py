"""Histogram: durations, of any number, in little memory, with quantiles of a bounded error."""

from __future__ import annotations

import math
from collections.abc import Mapping

ERROR = 0.01
"""Relative, of a quantile."""

_GROWTH = math.log((1 + ERROR) / (1 - ERROR))
_LEAST, _MOST = 1e-6, 1e7  # seconds: what is outside is counted at the edge


class Histogram:
    """Buckets whose edges grow by the factor (1 + ERROR) / (1 - ERROR), as those of DDSketch
    (Masson, Rim & Lee 2019), so that any value of a bucket is within ERROR of its middle. At most
    1,500 buckets."""

    def __init__(self, buckets: Mapping[int, int] | None = None, total: float = 0.0) -> None:
        self.buckets = dict(buckets or {})
        self.total = total

    def add(self, seconds: float) -> None:
        """seconds: at least 0."""
        bucket = math.ceil(math.log(min(max(seconds, _LEAST), _MOST)) / _GROWTH)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.total += seconds

    @property
    def n(self) -> int:
        """How many there are."""
        return sum(self.buckets.values())

    def mean(self) -> float:
        """Exact; 0 without any."""
        return self.total / n if (n := self.n) else 0.0

    def quantile(self, q: float) -> float:
        """The least value that a share q of all does not exceed, within ERROR; 0 without any."""
        rank, seen = max(math.ceil(q * self.n), 1), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                return math.exp(bucket * _GROWTH) * (1 - ERROR)
        return 0.0
