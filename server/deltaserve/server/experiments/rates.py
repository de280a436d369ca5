"""Confidence sequences for rates: exact at every count, and at all looks together.

If the rate is p, the likelihood of the outcomes averaged over all rates (uniformly) and divided by
that under p is a martingale that starts at 1, so it reaches 1 / level with probability `level` at
most (Ville 1939; Robbins 1970, "Statistical methods related to the law of the iterated logarithm").
The rates it does not reject are an interval."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from deltaserve.server.experiments.errors import InvalidExperiment, between
from deltaserve.server.experiments.intervals import Interval
from deltaserve.server.experiments.samples import Numbers


def log_evidence(successes: npt.ArrayLike, n: npt.ArrayLike, rate: npt.ArrayLike) -> Numbers:
    """ln(B(s + 1, n - s + 1) / (p^s (1 - p)^(n - s))) against the rate p. Arrays broadcast."""
    s, n = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    p = np.asarray(rate, np.float64)
    under = special.xlogy(s, p) + special.xlog1py(n - s, -p)
    return np.asarray(special.betaln(s + 1, n - s + 1) - under)


def bounds(
    successes: npt.ArrayLike, n: npt.ArrayLike, level: float = 0.05
) -> tuple[Numbers, Numbers]:
    """The least and the largest rate that is not rejected; arrays of the arguments' shape. Raises
    InvalidExperiment."""
    between("level", level, 0, 1)
    s, of = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    if not ((s >= 0) & (s <= of)).all():
        raise InvalidExperiment("successes", f"{successes!r} of {n!r} is not a part of it")
    best = np.where(of > 0, s / np.maximum(of, 1), 0.5)
    found = []
    for outside in (0.0, 1.0):
        out, within = np.full_like(best, outside), best.copy()
        for _ in range(60):
            middle = (out + within) / 2
            rejected = log_evidence(s, of, middle) >= -math.log(level)
            out, within = np.where(rejected, middle, out), np.where(rejected, within, middle)
        found.append(out)
    return found[0], found[1]


def rate_sequence(successes: int, n: int, level: float = 0.05) -> Interval:
    """Misses the rate at any look with probability `level` at most. Raises InvalidExperiment."""
    low, high = bounds(successes, n, level)
    return Interval(float(low), float(high))
