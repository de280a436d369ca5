"""Workspace: what launches write for the launches after them, shared by all groups of a model."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Named buffers that grow on demand; one per stream, since groups run one after the other.

    Nothing in it is cleared between steps, save the counters, which come back to zero by
    themselves: kernels read only what the step wrote.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A flat buffer of at least `count` numbers, the same one for the same name."""
        key = (name, dtype)
        found = self._buffers.get(key)
        if found is None or found.numel() < count:
            found = torch.zeros(max(count, 16), dtype=dtype, device=self.device)
            self._buffers[key] = found
        return found

    def buffers(self) -> tuple[Tensor, ...]:
        """Those of now: who keeps them, as a captured graph must, keeps their addresses valid when
        larger ones take their place."""
        return tuple(self._buffers.values())

    def poison(self) -> None:
        """Fills all but the counters with NaN: for tests that nothing stale is read."""
        for (_, dtype), buffer in self._buffers.items():
            if dtype.is_floating_point:
                buffer.fill_(float("nan"))
