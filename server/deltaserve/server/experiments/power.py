"""What an experiment can find, before it starts."""

from __future__ import annotations

import math
from statistics import NormalDist

from deltaserve.server.experiments.errors import at_least, between
from deltaserve.server.experiments.sequences import difference_radius


def detectable(
    n_a: int, n_b: int, variance: float, level: float = 0.05, power: float = 0.8
) -> float:
    """The least difference of means that one two-sided test at the end finds with probability
    `power`: (z_{1 - level / 2} + z_power) sqrt(variance (1 / n_a + 1 / n_b)). Of a rate p the
    variance is p (1 - p). Raises InvalidExperiment."""
    between("level", level, 0, 1)
    between("power", power, 0, 1)
    z = NormalDist().inv_cdf
    return (z(1 - level / 2) + z(power)) * _error(n_a, n_b, variance)


def detectable_anytime(
    n_a: int,
    n_b: int,
    variance: float,
    level: float = 0.05,
    power: float = 0.8,
    tuned_for: int = 5000,
) -> float:
    """The same for `difference_sequence`, of which looks before the end can only find more: its
    half width at the end + z_power standard errors. Raises InvalidExperiment."""
    between("power", power, 0, 1)
    error = _error(n_a, n_b, variance)
    half = float(difference_radius(n_a, variance, n_b, variance, level, tuned_for))
    return half + NormalDist().inv_cdf(power) * error


def _error(n_a: int, n_b: int, variance: float) -> float:
    at_least("n_a", n_a, 1)
    at_least("n_b", n_b, 1)
    at_least("variance", variance, 0)
    return math.sqrt(variance * (1 / n_a + 1 / n_b))
