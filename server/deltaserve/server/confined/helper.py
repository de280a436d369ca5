"""Helper: processes that do what may never end, or end its process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

CHILD = "deltaserve.server.confined.child"
WALL = 10
"""Times the processor seconds of a job after which it is ended in any case."""


class JobEnded(Exception):
    """The job was ended, or ended its process: it took too long, or too much memory or stack."""


class Helper:
    """Up to `processes` children, started when they are needed; one that a job has ended is
    replaced. Any thread may ask. shared: makes what every child is told first."""

    def __init__(self, shared: Callable[[], Mapping[str, Any]], processes: int = 2) -> None:
        self._shared = shared
        self._free = threading.Semaphore(processes)
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        self._closed = False

    def ask(self, job: Mapping[str, Any], seconds: float) -> Any:
        """The answer. seconds: of the processor, that the job may take. Raises JobEnded."""
        with self._free:
            child = self._take()
            timer = threading.Timer(WALL * seconds + WALL, child.kill)
            timer.start()
            try:
                answer = _exchange(child, {**job, "seconds": seconds})
            except (OSError, ValueError):
                answer = None
            finally:
                timer.cancel()
            if answer is None:
                _end(child)
                raise JobEnded(f"it needs more than {seconds:g} s, or too much memory")
            self._put_back(child)
            return answer

    def close(self) -> None:
        """End the children."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            _end(child)

    def _take(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        child = subprocess.Popen(
            [sys.executable, "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a signal from the keyboard is for the server alone
        )
        with contextlib.suppress(OSError):  # it is dead already: whoever asks it will notice
            _write(child, self._shared())
        return child

    def _put_back(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(child)
                return
        _end(child)


def _exchange(child: subprocess.Popen[str], job: Mapping[str, Any]) -> Any:
    assert child.stdout is not None
    _write(child, job)
    line = child.stdout.readline()
    return json.loads(line) if line else None


def _write(child: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(message) + "\n")
    child.stdin.flush()


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()
    child.wait()
