"""Casting for serving: shared tensors stay shared, dead ones are forgotten, at any moment."""

import gc
import threading

import torch

from deltaserve.kernels import cast as module
from deltaserve.kernels.cast import cast


def test_the_same_memory_is_cast_once_while_it_lives() -> None:
    source = torch.randn(4, 5)
    first = cast(source, torch.bfloat16)
    assert cast(source.view(4, 5), torch.bfloat16) is first
    assert cast(source, torch.bfloat16, transpose=True) is not first
    del first
    gc.collect()
    assert not any(known[1]() is None for known in module._known.values())


def test_the_collector_may_forget_while_a_cast_is_noted() -> None:
    """A cycle keeps a dead result for the collector, which then runs inside the lock."""
    cycle: list[object] = [cast(torch.randn(3, 3), torch.bfloat16)]
    cycle.append(cycle)
    del cycle

    def collect() -> None:
        with module._lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the finalizer waits for the lock that its own thread holds"
