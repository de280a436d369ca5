"""Adapters that come from cold files: beside sequences that decode, and for a first token."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from churn import Arrivals, forget

from deltaserve.server.engine.collector import Collector
from deltaserve.server.engine.engine import Engine
from gpu_serving.sizes import Sizes
from gpu_serving.streams import PATIENCE, Names, begin, request


def phase(
    engine: Engine, sizes: Sizes, names: Names, cold: Sequence[Path], rate: float
) -> tuple[list[float], list[float]]:
    """Seconds between the steps of sequences that decode, and of the loads beside them."""
    streams, took = begin(engine, sizes, names), list[float]()
    try:
        arrivals = Arrivals(engine, cold, rate) if rate else None
        first = len(streams.steps)
        if arrivals is not None:
            arrivals.start()
        time.sleep(sizes.seconds)
        streams.wait(2)
        times = [at for at, _ in streams.steps[first:]]
        if arrivals is not None:
            took = arrivals.finish()
    finally:
        streams.end(engine)
    return [b - a for a, b in itertools.pairwise(times)], took


def first_token(engine: Engine, sizes: Sizes, name: str, folder: Path) -> tuple[float, str]:
    """Seconds from the request for an adapter that is in no memory to its first token, and what
    `drop` said: it was registered, which has read its files once, and these were dropped then."""
    engine.adapters.load(name, str(folder), register_only=True).result(PATIENCE)
    state = drop(folder)
    asked, collector = request(sizes, 0, name, 1, length=16), Collector()
    began = time.perf_counter()
    engine.submit(asked, collector)
    collector.wait(asked.request_id, PATIENCE)
    took = time.perf_counter() - began
    engine.adapters.unload(name).result(PATIENCE)
    return took, state


def flush(folder: Path) -> None:
    """Has its files on the disk: those that are not cannot be dropped from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def drop(folder: Path) -> str:
    """Drops its files from the page cache. Returns "dropped", or "kept" if they are still there, or
    "unknown"."""
    forget(folder)
    largest = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    fd = os.open(largest, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(4096)], largest.stat().st_size // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return "dropped"
    except (OSError, AttributeError):
        return "unknown"
    finally:
        os.close(fd)
    return "kept"
