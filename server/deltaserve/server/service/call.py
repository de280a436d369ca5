"""Call: what a service knows of a request beside its message, whichever door it came through."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deltaserve.server.identity.caller import Caller


@dataclass(frozen=True, slots=True)
class Call:
    """seconds: how long the client waits, from now on; None if it did not say. correlation_id: the
    client's name for the call, of ``x-correlation-id``; empty if it gave none."""

    caller: Caller
    seconds: float | None = None
    correlation_id: str = ""

    def deadline(self, most: float) -> float:
        """By the monotonic clock: the client's, or the server's maximum."""
        return time.monotonic() + (most if self.seconds is None else min(self.seconds, most))
