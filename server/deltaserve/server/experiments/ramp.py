"""Weights that change with time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from deltaserve.server.experiments.assignment import check_weights
from deltaserve.server.experiments.errors import InvalidExperiment


@dataclass(frozen=True)
class Point:
    """From the time `at` on (seconds of any one clock) the arms have these weights."""

    at: float
    weights: Mapping[str, float]


def check_ramp(points: Sequence[Point]) -> None:
    """Raises InvalidExperiment unless there are points, their times are finite and rise, and their
    weights are right."""
    if not points:
        raise InvalidExperiment("ramp", "it has no point; give at least one")
    for i, point in enumerate(points):
        if not math.isfinite(point.at):
            raise InvalidExperiment(f"ramp[{i}].at", f"{point.at!r} is not a finite time")
        check_weights(point.weights, f"ramp[{i}].weights")
    for i, (one, two) in enumerate(pairwise(points)):
        if two.at <= one.at:
            raise InvalidExperiment(
                f"ramp[{i + 1}].at", f"{two.at!r} is not later than {one.at!r} of the point before"
            )


def weights_at(
    points: Sequence[Point], time: float, shape: Literal["step", "linear"] = "step"
) -> dict[str, float]:
    """The shares of the arms at a time; they sum to 1. Before the first point they are its shares,
    after the last one that one's. In between `step` keeps the earlier point's; `linear` goes
    straight from one point's shares to the next one's. An arm that a point does not name has
    share 0 there. Raises InvalidExperiment."""
    check_ramp(points)
    if not math.isfinite(time):
        raise InvalidExperiment("time", f"{time!r} is not a finite time")
    if shape not in ("step", "linear"):
        raise InvalidExperiment("shape", f"{shape!r} is not 'step' or 'linear'")
    arms = dict.fromkeys(arm for point in points for arm in point.weights)
    i = max((i for i, point in enumerate(points) if point.at <= time), default=0)
    one = points[i]
    two = points[min(i + 1, len(points) - 1)]
    done = 0.0
    if shape == "linear" and one.at <= time < two.at:
        done = (time - one.at) / (two.at - one.at)
    a, b = math.fsum(one.weights.values()), math.fsum(two.weights.values())
    return {
        arm: (1 - done) * one.weights.get(arm, 0) / a + done * two.weights.get(arm, 0) / b
        for arm in arms
    }
