"""Capturing a step: as a CUDA graph, behind an interface that tests have another form of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Capture(Protocol):
    """Graphs of one model, never replayed at the same time: they share memory for what is between
    their inputs and outputs."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """run: launches a step that reads tensors at fixed addresses, and neither waits for the
        device nor asks it anything. -> replays those launches; its result is always the same
        tensor, filled anew."""
        ...


class CudaCapture:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Once outside: what is made at first use (workspaces, cached tables) is made to stay.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
