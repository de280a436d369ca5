"""Watchers: who is told of every change of an adapter's state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from deltaserve.server.engine.core import AdapterInfo

log = logging.getLogger(__name__)


class Watchers:
    """Called from whatever thread makes a change; one that fails disturbs nobody else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[AdapterInfo], None]] = []

    def subscribe(self, callback: Callable[[AdapterInfo], None]) -> Callable[[], None]:
        """The result ends it; calling it again does nothing."""
        with self._lock:
            self._callbacks.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return unsubscribe

    def tell(self, info: AdapterInfo) -> None:
        for callback in list(self._callbacks):
            try:
                callback(info)
            except Exception:
                log.exception("a watcher of adapters failed")
