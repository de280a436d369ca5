"""Confidence sequences for means: intervals that hold at all looks together, however often and for
whatever reason one looks or stops.

Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024, "Time-uniform central limit theory and
asymptotic confidence sequences", theorem 2.2. They hold asymptotically, as the central limit
theorem does, so nothing is said before `start` users per arm, nor of values that never differed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from deltaserve.server.experiments.errors import at_least, between
from deltaserve.server.experiments.intervals import UNKNOWN, Interval
from deltaserve.server.experiments.samples import Numbers, Sample

START = 100


def radius(
    n: npt.ArrayLike, variance: npt.ArrayLike, level: float = 0.05, tuned_for: int = 5000
) -> Numbers:
    """Half the width after n users, at any n: sigma sqrt(2 (n r^2 + 1) / (n r)^2 ln(sqrt(n r^2 + 1)
    / level)), r^2 = (-2 ln level + ln(1 - 2 ln level)) / tuned_for. It is about the narrowest at
    n = tuned_for, which must be chosen before the data. n, variance, result: of one shape."""
    between("level", level, 0, 1)
    at_least("tuned_for", tuned_for, 1)
    n = np.asarray(n, np.float64)
    r2 = (-2 * math.log(level) + math.log(1 - 2 * math.log(level))) / tuned_for
    t = n * r2 + 1
    scale = 2 * t / (n * n * r2) * (np.log(t) / 2 - math.log(level))
    return np.asarray(np.sqrt(np.asarray(variance, np.float64) * scale))


def difference_radius(
    n_a: npt.ArrayLike,
    variance_a: npt.ArrayLike,
    n_b: npt.ArrayLike,
    variance_b: npt.ArrayLike,
    level: float = 0.05,
    tuned_for: int = 5000,
) -> Numbers:
    """The same for the difference of two arms' means: `radius` of n = n_a + n_b users, one of whom
    has the variance n (variance_a / n_a + variance_b / n_b). tuned_for: users of both arms."""
    n_a, n_b = np.asarray(n_a, np.float64), np.asarray(n_b, np.float64)
    n = n_a + n_b
    return radius(n, n * (variance_a / n_a + variance_b / n_b), level, tuned_for)


def mean_sequence(
    sample: Sample, level: float = 0.05, tuned_for: int = 5000, start: int = START
) -> Interval:
    """Misses the mean at any look from `start` users on with probability `level`. Raises
    InvalidExperiment."""
    half = float(radius(max(sample.n, 1), sample.variance, level, tuned_for))
    if sample.n < max(start, 2) or half == 0:
        return UNKNOWN
    return Interval(sample.mean - half, sample.mean + half)


def difference_sequence(
    a: Sample, b: Sample, level: float = 0.05, tuned_for: int = 5000, start: int = START
) -> Interval:
    """The same for mean(b) - mean(a), from `start` users per arm on. Raises InvalidExperiment."""
    sizes = max(a.n, 1), a.variance, max(b.n, 1), b.variance
    half = float(difference_radius(*sizes, level, tuned_for))
    if min(a.n, b.n) < max(start, 2) or half == 0:
        return UNKNOWN
    return Interval(b.mean - a.mean - half, b.mean - a.mean + half)
