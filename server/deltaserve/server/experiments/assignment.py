"""Which arm a user gets: weighted rendezvous hashing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from deltaserve.server.experiments.errors import InvalidExperiment, at_least
from deltaserve.server.experiments.hashing import fraction


def check_weights(weights: Mapping[str, float], field: str = "weights") -> None:
    """Raises InvalidExperiment unless there are arms, every weight is finite and not negative, and
    one is positive."""
    if not weights:
        raise InvalidExperiment(field, "there is no arm; give at least one")
    for arm, weight in weights.items():
        at_least(f"{field}[{arm!r}]", weight, 0)
    if not 0 < math.fsum(weights.values()) < math.inf:
        raise InvalidExperiment(field, "they have no positive, finite sum; give an arm some weight")


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights divided by their sum. Raises InvalidExperiment."""
    check_weights(weights)
    total = math.fsum(weights.values())
    return {arm: weight / total for arm, weight in weights.items()}


def assign(salt: str, weights: Mapping[str, float], key: str) -> str:
    """The arm of the user `key`: the one with the least -ln(h) / weight, where
    h = fraction("arm", salt, arm, key). Arms are known by name, so their order does not matter, and
    only the weights' ratios do.

    -ln(h) / weight is exponential with rate `weight`, so the arm of rate w is first with
    probability w / sum (Schindelhauer & Schomaker 2005, "Weighted distributed hash tables").
    Raises InvalidExperiment."""
    check_weights(weights)
    return min(
        (-math.log(fraction("arm", salt, arm, key)) / weight, arm)
        for arm, weight in weights.items()
        if weight > 0
    )[1]


def covered(salt: str, share: float, key: str) -> bool:
    """Whether the user `key` takes part at all when `share` of the users does. Who takes part at a
    share does so at every larger one. Raises InvalidExperiment."""
    if not 0 <= share <= 1:
        raise InvalidExperiment("share", f"{share!r} is not between 0 and 1")
    return fraction("coverage", salt, key) < share


def moved_share(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The share of users whose arm is another one after the weights changed:
    1 - sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) over the arms with p_i and q_i > 0.

    With t = sum |p - q| / 2, the least that any method must move, this is t itself if one arm's
    weight changed against all others (one arm more, one less, two arms), and never more than
    2 t / (1 + t), which no method that knows only its own weights can better for all weights
    (Bavarian et al. 2020, "Optimality of correlated sampling strategies").
    Raises InvalidExperiment."""
    p, q = shares(before), shares(after)
    arms = p.keys() | q.keys()
    return 1 - math.fsum(
        1 / math.fsum(max(p.get(j, 0) / p[i], q.get(j, 0) / q[i]) for j in arms)
        for i in arms
        if p.get(i, 0) > 0 and q.get(i, 0) > 0
    )
