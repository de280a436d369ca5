"""Confidence intervals for one look, at a number of users that was fixed before."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from scipy import stats

from deltaserve.server.experiments.errors import InvalidExperiment, between
from deltaserve.server.experiments.samples import Sample


class Interval(NamedTuple):
    low: float
    high: float


UNKNOWN = Interval(-math.inf, math.inf)


def mean_interval(sample: Sample, level: float = 0.05) -> Interval:
    """Student's interval, which misses the mean with probability `level`; UNKNOWN below 2 users.
    Raises InvalidExperiment."""
    between("level", level, 0, 1)
    if sample.n < 2:
        return UNKNOWN
    half = stats.t.isf(level / 2, sample.n - 1) * math.sqrt(sample.variance / sample.n)
    return Interval(sample.mean - float(half), sample.mean + float(half))


def difference_interval(a: Sample, b: Sample, level: float = 0.05) -> Interval:
    """Welch's interval for mean(b) - mean(a); UNKNOWN while an arm has fewer than 2 users. Raises
    InvalidExperiment."""
    between("level", level, 0, 1)
    if min(a.n, b.n) < 2:
        return UNKNOWN
    u, v = a.variance / a.n, b.variance / b.n
    freedom = (u + v) ** 2 / (u**2 / (a.n - 1) + v**2 / (b.n - 1)) if u + v else 1.0
    half = float(stats.t.isf(level / 2, freedom)) * math.sqrt(u + v)
    return Interval(b.mean - a.mean - half, b.mean - a.mean + half)


def rate_interval(successes: int, n: int, level: float = 0.05) -> Interval:
    """Wilson's score interval for a rate. Raises InvalidExperiment."""
    between("level", level, 0, 1)
    if not 0 <= successes <= n or n < 1:
        raise InvalidExperiment("successes", f"{successes} of {n} is not a part of at least 1")
    z = NormalDist().inv_cdf(1 - level / 2)
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))
