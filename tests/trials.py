"""Trials as routes would hand them to a ledger."""

from __future__ import annotations

from itertools import count

from deltaserve.server.ledger.trial import Ended, Trial

HALVES = {"a": 0.5, "b": 0.5}
IDS = count()
START = 2e9
"""Seconds: later than what a database forgets."""


def trial(user: str, arm: str, **fields: object) -> Trial:
    """Of route r, epoch 1, tenant t."""
    given = {
        "request_id": f"r{next(IDS)}",
        "route": "r",
        "epoch": 1,
        "tenant": "t",
        "shadow": False,
        "at": START,
        "ended": Ended.ANSWERED,
        "first_token": 0.1,
        "seconds": 1.0,
        "weights": HALVES,
    }
    return Trial(user=user, arm=arm, **{**given, **fields})  # type: ignore[arg-type]
