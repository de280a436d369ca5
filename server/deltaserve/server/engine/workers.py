"""Workers: a few threads that do the most urgent job first."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from enum import IntEnum

log = logging.getLogger(__name__)


class Urgency(IntEnum):
    """Lower is done first; jobs of one urgency in the order in which they came."""

    WANTED = 0  # a request waits for it
    ASKED = 1
    WHENEVER = 2


class Workers:
    """begin: called once on each thread. Threads start with the first job."""

    def __init__(self, count: int, name: str, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._news = threading.Condition()
        self._jobs: list[tuple[Urgency, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{i}", daemon=True)
            for i in range(count)
        ]
        self._started = False

    def submit(self, urgency: Urgency, job: Callable[[], None]) -> None:
        """Do it on one of the threads. What it raises is logged."""
        with self._news:
            if self._closed:
                return
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            heapq.heappush(self._jobs, (urgency, next(self._numbers), job))
            self._news.notify()

    def close(self) -> None:
        """Drop the jobs that have not begun, and wait for the others."""
        with self._news:
            self._closed = True
            self._jobs.clear()
            self._news.notify_all()
        for thread in self._threads if self._started else ():
            thread.join()

    def _work(self) -> None:
        self._begin()
        while True:
            with self._news:
                while not self._jobs and not self._closed:
                    self._news.wait()
                if self._closed:
                    return
                _, _, job = heapq.heappop(self._jobs)
            try:
                job()
            except Exception:
                log.exception("a job failed on %s", threading.current_thread().name)
            del job  # what it holds must not live until the next one comes
