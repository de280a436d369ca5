"""How many processes compile at the start."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

import pytest
import torch

from deltaserve.kernels.gpu import precompile
from deltaserve.kernels.gpu.variants import GroupSpec, of_group


@pytest.mark.parametrize(("own", "started"), [(6, 6), (192, precompile.MOST)])
def test_a_process_for_each_processor_that_is_ours(
    own: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may have more than a container, and memory for fewer."""
    found: list[int] = []

    class Pool:
        def __init__(self, workers: int, mp_context: object) -> None:
            found.append(workers)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, job: Callable[..., None], *_: Any) -> Future[None]:
            done: Future[None] = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr(precompile, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(own)), raising=False)
    spec = GroupSpec("qkv", "int4", 256, (64, 64), 128, torch.bfloat16)
    precompile.precompile(list(of_group(spec, (1, 16, 64, 256), 90)), 90)
    assert found == [started]
