"""Layers: routes that exclude each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deltaserve.server.experiments.errors import InvalidExperiment
from deltaserve.server.experiments.hashing import fraction


@dataclass(frozen=True)
class Slice:
    """The users whose hash in the layer is in [start, end), 0 <= start < end <= 1."""

    route: str
    start: float
    end: float


def check_slices(slices: Sequence[Slice]) -> None:
    """Raises InvalidExperiment for a slice outside [0, 1), an empty one, and two that overlap. A
    route may have several slices."""
    for part in slices:
        if not 0 <= part.start < part.end <= 1:
            raise InvalidExperiment(
                f"slices[{part.route!r}]",
                f"[{part.start!r}, {part.end!r}) is not a range with 0 <= start < end <= 1",
            )
    ordered = sorted(slices, key=lambda part: part.start)
    for one, two in pairwise(ordered):
        if two.start < one.end:
            raise InvalidExperiment(
                f"slices[{two.route!r}]",
                f"[{two.start!r}, {two.end!r}) overlaps [{one.start!r}, {one.end!r}) of "
                f"{one.route!r}; start at {one.end!r} or later",
            )


def route_of(layer: str, slices: Sequence[Slice], key: str) -> str | None:
    """The one route of the layer in whose slice the user `key` is, or None. The hash depends on the
    layer and the user alone, so a slice that grows keeps its users. Raises InvalidExperiment."""
    check_slices(slices)
    place = fraction("layer", layer, key)
    return next((part.route for part in slices if part.start <= place < part.end), None)
