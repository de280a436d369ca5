"""Microseconds of a few launches, by replay of a CUDA graph over rotating operands."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
ROUNDS, REPLAYS = 2, 20
GRAPH_CALLS = 48
"""At least this many calls are captured, so that starting the graph is nothing beside them."""


@dataclass(frozen=True)
class Timing:
    """us: the median of all replays, per call. rounds: the median of each round, which say how far
    the figure moves. nodes: graph nodes per call, None if they could not be counted."""

    us: float
    rounds: tuple[float, ...]
    nodes: float | None


def measure(calls: Sequence[Call], replays: int = REPLAYS) -> Timing:
    """The time of one call; `calls` do the same on operands of their own, in rotation."""
    if not torch.cuda.is_available():
        return _measure_on_the_cpu(calls)
    graph, captured = capture(calls)
    times: list[list[float]] = []
    for _ in range(ROUNDS):
        graph.replay()
        times.append([_replay_us(graph) / captured for _ in range(replays)])
    medians = tuple(statistics.median(t) for t in times)
    count = _count_nodes(graph)
    return Timing(
        statistics.median([t for round_ in times for t in round_]),
        medians,
        None if count is None else count / captured,
    )


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all captures and the calls before them: some peers keep buffers by stream."""
    return torch.cuda.Stream()


def capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls, repeated until there are GRAPH_CALLS, and their number. Every call is
    made once before: it may compile, tune or allocate what it keeps."""
    stream = _stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    repeats = -(-GRAPH_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its nodes can be counted
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, repeats * len(calls)


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()  # keeps the device busy while the measured replay is being enqueued
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end))


def _count_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_size_t()
        handle = ctypes.c_void_p(graph.raw_cuda_graph())
        failed = driver.cuGraphGetNodes(handle, None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return None
    return None if failed else count.value


def _measure_on_the_cpu(calls: Sequence[Call]) -> Timing:
    """One call each, by the clock: shows that the code runs, and nothing else."""
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return Timing(statistics.median(times), tuple(times), None)
