"""Capturing a step: as a CUDA graph, behind an interface that tests have another form of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class NotCapturable(RuntimeError):
    """The step waits for the device, asks it something, or does what a graph cannot hold; the
    message says what."""


class Capture(Protocol):
    """Graphs of one model, never replayed at the same time: they share memory for what is between
    their inputs and outputs."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """run: launches a step that reads tensors at fixed addresses, and neither waits for the
        device nor asks it anything. -> replays those launches; its result is always the same
        tensor, filled anew. Raises NotCapturable."""
        ...


class CudaCapture:
    """Steps are run first, and captured, on one stream of their own: what is made for a stream at
    its first use, as cuBLAS's workspace, is then made before any graph, and stays. What other
    threads ask of the device meanwhile is no concern of a capture's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):  # left behind too where a capture fails at its end
            run()
            try:
                self._watched(run)
                out = self._captured(graph, run)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize(self._device)  # raises where the GPU itself is broken
                raise NotCapturable(str(error)) from error
        current.wait_stream(self._stream)
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _captured(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            return run()

    def _watched(self, run: Callable[[], Tensor]) -> None:
        """Once more, with an error where the host waits for the device."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
