"""Schedulers that do not keep a flow's share, for fairness.py: what of the scheduler's module to
replace for each."""

from __future__ import annotations

from typing import Any

from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.fair_queue import FairQueue, Flow, Tenant
from deltaserve.server.engine.sequence import Sequence


class OneFlow(FairQueue):
    """Takes everybody for the same, so the order is that of arrival."""

    def _flow(self, sequence: Sequence) -> Flow:
        tenant = self._tenants.setdefault("", Tenant(""))
        self._flows = 1
        return tenant.flows.setdefault("", Flow(tenant, ""))


class RoundRobin(FairQueue):
    """A request of each flow by turns, whatever it costs."""

    def take(self, sequence: Sequence) -> None:
        super().take(sequence)
        if not sequence.ticketed:
            super().charge(sequence, 1.0)

    def charge(self, sequence: Sequence, seconds: float) -> None:
        pass


def nobody(*how: object) -> None:
    """Nobody has a right to another's place."""


def in_order(
    prompts: list[Sequence], head: Sequence | None, budget: int, batch: Batch
) -> list[tuple[Sequence, int]]:
    """All that is left of the step for the first one, then for the next."""
    left, shares = budget - batch.prompt_tokens, []
    for s in prompts:
        shares.append((s, min(s.pending, left)))
        left -= shares[-1][1]
    return shares


QUEUES: dict[str, dict[str, Any]] = {
    "first come, first served": {
        "FairQueue": OneFlow,
        "claim": nobody,
        "prompt_shares": in_order,
    },
    "round robin by requests": {"FairQueue": RoundRobin},
}
