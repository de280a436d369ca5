"""StaticMemory: what the host tells the device of a step, at fixed addresses, in one copy."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGN = 4
"""Pieces start at multiples of 16 bytes."""


class StaticMemory:
    """`count` int32 numbers on the device and as many in pinned memory, handed out in pieces."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._staging = torch.zeros(count, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._buffer = torch.zeros(count, dtype=torch.int32, device=device)
        self._taken = 0

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """(in host memory, on the device), int32 [count], zeros. Raises ValueError."""
        start, end = self._taken, self._taken + count
        if end > self._buffer.numel():
            raise ValueError(f"{end} numbers, and there is room for {self._buffer.numel()}")
        self._taken = end + -end % ALIGN
        return self._staging[start:end], self._buffer[start:end]

    def send(self) -> None:
        """One copy of all of it, in the order of the current stream. What was sent before must have
        arrived before the pieces in host memory are changed."""
        self._buffer.copy_(self._staging, non_blocking=True)
