"""Float32 copies of a step's outputs, for sums of several terms that are rounded once.

A prompt's step has tens of megabytes of them for every group of linears; memory taken anew each
time costs more in page faults than the sums do.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Held(threading.local):
    def __init__(self) -> None:
        self.buffer = torch.empty(0)


_held = _Held()


def widen(y: Tensor) -> Tensor:
    """y in float32: itself, or a copy in memory of the calling thread that the next call reuses."""
    if y.dtype == torch.float32:
        return y
    if y.numel() > _held.buffer.numel():
        _held.buffer = torch.empty(y.numel())
    return _held.buffer[: y.numel()].view(y.shape).copy_(y)
