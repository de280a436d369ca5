"""What can be wrong with the arguments of the experiments' functions."""

from __future__ import annotations

import math


class InvalidExperiment(ValueError):
    """An argument is wrong. `field` names it; the message has its value and what would be right."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def between(field: str, value: float, low: float, high: float) -> None:
    """Raises InvalidExperiment unless low < value < high."""
    if not low < value < high:
        raise InvalidExperiment(
            field, f"{value!r} is not between {low:g} and {high:g}, both excluded"
        )


def at_least(field: str, value: float, low: float) -> None:
    """Raises InvalidExperiment unless value is finite and at least low."""
    if not (math.isfinite(value) and value >= low):
        raise InvalidExperiment(field, f"{value!r} is not a finite number of at least {low:g}")
