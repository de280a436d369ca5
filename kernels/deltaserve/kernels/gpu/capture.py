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
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()  # what is made at first use (workspaces, cached tables) is made to stay
            self._watched(run)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                out = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotCapturable(str(error)) from error
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _watched(self, run: Callable[[], Tensor]) -> None:
        """Once more, with an error where the host waits for the device."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotCapturable(str(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)
