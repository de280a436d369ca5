"""Sample-ratio mismatch: whether the arms have the numbers of users that their weights say. If not,
something loses users of one arm, and nothing else of the experiment can be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from deltaserve.server.experiments.assignment import shares
from deltaserve.server.experiments.errors import InvalidExperiment, at_least
from deltaserve.server.experiments.samples import Numbers


def _aligned(counts: Mapping[str, int], weights: Mapping[str, float]) -> tuple[Numbers, Numbers]:
    wanted = shares(weights)
    for arm, count in counts.items():
        at_least(f"counts[{arm!r}]", count, 0)
        if count and not wanted.get(arm):
            raise InvalidExperiment(
                f"counts[{arm!r}]", f"{count} users in an arm without weight; count others apart"
            )
    arms = [arm for arm, share in wanted.items() if share > 0]
    return np.array([counts.get(a, 0) for a in arms], float), np.array([wanted[a] for a in arms])


def chi_square(counts: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """Pearson's p-value, for one look; customary alarm below 0.001. It is 1 without users or
    with one arm. The approximation wants 5 users expected in each arm. Raises InvalidExperiment."""
    found, wanted = _aligned(counts, weights)
    if not found.sum() or len(found) == 1:
        return 1.0
    return float(stats.chisquare(found, wanted * found.sum()).pvalue)


def log_evidence(counts: npt.ArrayLike, wanted: npt.ArrayLike, belief: float = 100) -> Numbers:
    """ln of the likelihood of the counts (..., arms) averaged over shares ~ Dirichlet(belief *
    wanted), divided by that of the shares `wanted` (arms,). A martingale from 1 if these are right,
    whenever one looks (Lindon & Malek 2022, "Anytime-valid inference for multinomial count data").
    A larger belief finds small mismatches sooner and large ones later."""
    n, p = np.asarray(counts, np.float64), np.asarray(wanted, np.float64)
    prior = belief * p
    gains = special.gammaln(prior + n) - special.gammaln(prior) - n * np.log(p)
    return np.asarray(gains.sum(-1) + special.gammaln(belief) - special.gammaln(belief + n.sum(-1)))


def sequential(
    counts: Mapping[str, int], weights: Mapping[str, float], belief: float = 100
) -> float:
    """A p-value that may be looked at as often as wanted: exp(-log_evidence), at most 1. Over
    periods of different weights the logarithms of the evidence add up. Raises InvalidExperiment."""
    at_least("belief", belief, 1e-3)
    found, wanted = _aligned(counts, weights)
    return math.exp(min(-float(log_evidence(found, wanted, belief)), 0.0))
