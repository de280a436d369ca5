"""What routes hand to a ledger, and what it tells them of their arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deltaserve.server.experiments.samples import Sample
from deltaserve.server.ledger.trial import Trial

NO_REWARDS = Sample(0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Tally:
    """One arm's users, shadows' as well; once users are assigned at random, those alone. met: how
    many of them met with what a guardrail counts, at least once, by the metric's name in lower
    case: ``error``, ``slow``, ``slow_first_token``, ``refusal``, ``empty``, ``long``,
    ``negative_feedback``; one that is missing is 0. rewards: one value per user
    with feedback, the mean of theirs."""

    users: int = 0
    met: Mapping[str, int] = field(default_factory=dict)
    rewards: Sample = NO_REWARDS


@dataclass(frozen=True, slots=True)
class Tallies:
    """arms: by name; one without users may be missing. mismatch: `srm.sequential`'s p-value of the
    arms' users against the weights that held when they came."""

    arms: Mapping[str, Tally] = field(default_factory=dict)
    mismatch: float = 1.0


class Ledger(Protocol):
    """Of one event loop."""

    def record(self, trial: Trial) -> None:
        """A request has ended. At once: whatever takes long is done later."""

    async def tallies(
        self, route: str, epoch: int, limits: Mapping[str, float] | None = None
    ) -> Tallies:
        """What came of one epoch of a route so far. limits: of ``slow`` and ``slow_first_token`` in
        seconds, of ``long`` in tokens."""
