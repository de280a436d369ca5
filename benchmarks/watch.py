"""An outbox that notes when first tokens come."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Watch:
    """first: when each request's first token came. tokens: of all answers. open: requests that
    have not ended; the caller adds them."""

    first: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    open: set[str] = field(default_factory=set)
    news: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, outputs: list[Any]) -> None:
        now = time.perf_counter()
        with self.news:
            for o in outputs:
                if o.error is not None and o.finish_reason != "cancelled":
                    raise o.error
                self.tokens += len(o.token_ids)
                if o.token_ids:
                    self.first.setdefault(o.request_id, now)
                if o.finish_reason is not None:
                    self.open.discard(o.request_id)
            self.news.notify_all()

    def wait(self, most: int) -> None:
        """Until no more than so many are open."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.open) <= most, 300), "300 s without an end"


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
