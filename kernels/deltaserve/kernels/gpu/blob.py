"""Blob: everything that one adapter has in one group, as one piece of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.gpu.arena import ALIGN, UNIT


class BlobWriter:
    """Collects tensors; `bytes` is what is copied to the arena, in one go.

    Tensors are told by their offset in the blob, in units of 16 bytes; each starts a cache line.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._units = 0
        self._known: dict[tuple[int, int], int] = {}

    def add(self, tensor: Tensor) -> int:
        """Returns its offset. A tensor given twice is held once."""
        raw = torch.empty(0, dtype=torch.uint8)
        if tensor.numel():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        key = (raw.data_ptr(), raw.numel())
        if raw.numel() and key in self._known:
            return self._known[key]
        offset = self._units
        line = UNIT * ALIGN
        self._parts.append(raw)
        self._parts.append(torch.zeros(-raw.numel() % line, dtype=torch.uint8))
        self._units += -(-raw.numel() // line) * ALIGN
        self._known[key] = offset
        return offset

    def bytes(self) -> Tensor:
        """uint8 [n], n a multiple of 128."""
        if not self._parts:
            return torch.empty(0, dtype=torch.uint8)
        return torch.cat(self._parts)
