"""Discard: adapters that left the model give their memory back on a thread of their own.

Freeing large tensors unmaps them, tens of milliseconds a gigabyte under the interpreter's lock, so
the lock is given up in between.
"""

from __future__ import annotations

import time
from functools import partial

from deltaserve.kernels.base import onednn
from deltaserve.server.engine.residency import Prepared
from deltaserve.server.engine.workers import Urgency, Workers

BYTES = 1 << 20
"""Freed before others get the lock."""


class Discard:
    """Call it, on any thread, with what nobody else uses any more."""

    def __init__(self) -> None:
        self._workers = Workers(1, "deltaserve-discard", lambda: None)

    def __call__(self, prepared: Prepared) -> None:
        self._workers.submit(Urgency.WANTED, partial(_take_apart, [prepared]))

    def close(self) -> None:
        """Free what is left here."""
        self._workers.close()


def _take_apart(held: list[Prepared]) -> None:
    """held: emptied, as the caller's references would keep the memory."""
    tensors = list(held[0].tensors())
    held.clear()
    freed = 0
    while tensors:
        freed += onednn.nbytes(tensors.pop())
        if freed >= BYTES:
            freed = 0
            time.sleep(0)
