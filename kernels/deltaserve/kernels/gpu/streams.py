"""Streams: what staging needs of a device, so that its order can be tested without one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    def done(self) -> bool:
        """Whether everything before it has happened; returns at once."""
        ...


class Streams(Protocol):
    """A stream of copies beside the current one, that of the steps."""

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 in host memory that the device copies from without a detour."""
        ...

    def after_steps(self) -> None:
        """Copies from now on happen after the steps that were launched so far."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Launch a copy from pinned memory, which must stay as it is until it is done."""
        ...

    def record(self) -> Event:
        """Done when the copies so far are."""
        ...


class CudaStreams:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def after_steps(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._side)
        return _CudaEvent(event)


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class HostStreams:
    """Of the interpreter, whose device memory is the host's: everything happens at once."""

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def after_steps(self) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record(self) -> Event:
        return _Done()


class _Done:
    def done(self) -> bool:
        return True


def streams(device: torch.device) -> Streams:
    """Those of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, made beside the steps. tensor: one that nobody writes to any more,
    though what was launched so far may still be making it."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    side = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(side):
        return tensor.cpu()
