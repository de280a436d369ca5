"""StaticMemory: what the host tells the device of a step, at fixed addresses, in one copy."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGN = 4
"""Pieces start at multiples of 16 bytes."""


class StaticMemory:
    """`count` int32 numbers on the device, handed out in pieces, and as many in pinned memory, on
    each of some sides: while one is being copied, another may be written."""

    def __init__(self, count: int, device: torch.device, sides: int = 1) -> None:
        self._sides = [
            torch.zeros(count, dtype=torch.int32, pin_memory=device.type == "cuda")
            for _ in range(sides)
        ]
        self._buffer = torch.zeros(count, dtype=torch.int32, device=device)
        self._taken = 0

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self._buffer.nbytes

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """(in host memory, of the first side; on the device), int32 [count], zeros. Raises
        ValueError."""
        start, end = self._taken, self._taken + count
        if end > self._buffer.numel():
            raise ValueError(f"{end} numbers, and there is room for {self._buffer.numel()}")
        self._taken = end + -end % ALIGN
        return self._sides[0][start:end], self._buffer[start:end]

    def on(self, side: int, piece: Tensor) -> Tensor:
        """What stands for a piece in host memory on another side."""
        start = piece.storage_offset()
        return self._sides[side][start : start + piece.numel()]

    def send(self, side: int = 0, start: int = 0, end: int | None = None) -> None:
        """One copy of the numbers from `start` to `end`, all of them if neither is given, in the
        order of the current stream. What was sent before from this side must have arrived before
        its pieces in host memory are changed."""
        self._buffer[start:end].copy_(self._sides[side][start:end], non_blocking=True)
