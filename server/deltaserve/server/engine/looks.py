"""Looks: an idle engine's looks at its books."""

from __future__ import annotations

import time
from collections.abc import Callable

APART = 50
"""Times as long as a look takes, from one to the next."""


class Looks:
    """check: raises if something is lost or held twice. With thousands of adapters it takes a while
    in which nothing else is done, so it has a small part of the time."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._next = 0.0

    def look(self) -> None:
        """Unless the last look was just now. Raises what the check does."""
        began = time.perf_counter()
        if began >= self._next:
            self._check()
            self._next = began + (time.perf_counter() - began) * APART
