"""Looks: the rewards of the arms as they were, so that intervals can be drawn over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, NamedTuple

from deltaserve.server.experiments.samples import Sample

SECONDS = 60.0
MOST = 512


class Look(NamedTuple):
    at: float
    arms: Mapping[str, Sample]


class Looks:
    """One each `seconds`, when there was feedback; of more than MOST every second one is dropped
    and the time between them doubled. A look costs a pass over all users."""

    def __init__(self) -> None:
        self.kept: list[Look] = []
        self.seconds = SECONDS
        self.begun = False
        self.fresh = False
        """Whether there is one that the database does not have."""

    def begin(self, at: float) -> bool:
        """Whether it is time for one, the first at once, and none is `begun`."""
        if self.begun or (self.kept and at < self.kept[-1].at + self.seconds):
            return False
        self.begun = True
        return True

    def keep(self, at: float, samples: Mapping[str, Sample]) -> None:
        """One that has begun."""
        self.kept.append(Look(at, samples))
        self.fresh = True
        if len(self.kept) > MOST:
            self.kept = self.kept[1::2]
            self.seconds *= 2

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        kept = [[look.at, {a: astuple(s) for a, s in look.arms.items()}] for look in self.kept]
        return {"seconds": self.seconds, "kept": kept}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Looks:
        """`dump` back."""
        looks = cls()
        looks.seconds = dumped["seconds"]
        looks.kept = [
            Look(at, {a: Sample(*s) for a, s in arms.items()}) for at, arms in dumped["kept"]
        ]
        return looks

    def chosen(self, points: int, now: Look) -> list[Look]:
        """So many, evenly among those that there are, of which `now` is the last."""
        every = [*(look for look in self.kept if look.at < now.at), now]
        if points >= len(every):
            return every
        step = len(every) / points if points else 0.0
        return [every[len(every) - 1 - int(i * step)] for i in range(points)][::-1]
