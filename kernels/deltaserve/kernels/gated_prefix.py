"""GatedPrefixes: attention to prompts beside the sequence, of a step's adapters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.primitives import GatedPrefix, tensors
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import unique_bytes


class PreparedPrefix:
    """prefix: in the dtype it is served in, in host memory."""

    def __init__(self, prefix: GatedPrefix) -> None:
        self.prefix = prefix

    def tensors(self) -> tuple[Tensor, ...]:
        return tensors(self.prefix)

    @property
    def nbytes(self) -> int:
        return unique_bytes(self.tensors())


class GatedPrefixes:
    """Those that are installed. Engine thread."""

    def __init__(self) -> None:
        self._prepared: dict[int, PreparedPrefix] = {}

    @property
    def slots(self) -> Collection[int]:
        """Those that hold one."""
        return self._prepared.keys()

    def install(self, slot: int, prepared: Any) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. prepared: as the backend
        packed it."""
        assert isinstance(prepared, PreparedPrefix)
        self._prepared[slot] = prepared

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        self._prepared.pop(slot, None)

    def acts(self, segments: Segments) -> bool:
        """Whether an adapter of the step has one."""
        return not segments.slots.isdisjoint(self.slots)

    def rows(self, segments: Segments) -> list[int]:
        """Of the step's tokens, those whose attention gains something, ascending."""
        own = (e for e in segments.entries if e[2] in self.slots)
        return sorted({row for start, end, _, _ in own for row in range(start, end)})

    def add(self, out: Tensor, query: Tensor, layer: int, segments: Segments, scale: float) -> None:
        """``out += strength * softmax(scale query keys^T) values`` in the rows of the adapters that
        have a prefix in this layer. out: [T, H, Dv], changed in place; query: [H, T, Dk], as the
        layer's attention sees it. layer: its number among the attention layers."""
        for start, end, slot, strength in segments.entries:
            if slot not in self.slots:
                continue
            keys, values = (t.transpose(0, 1) for t in self._layer(slot, layer))
            if not keys.shape[1]:
                continue
            q = query[:, start:end]
            grouped = q.reshape(keys.shape[0], -1, q.shape[2])  # query heads by the head they read
            weights = torch.softmax((grouped @ keys.mT).float() * scale, -1).to(values.dtype)
            y = (weights @ values).view(q.shape[0], end - start, -1)
            out[start:end].add_(y.transpose(0, 1), alpha=strength)

    def _layer(self, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, kv_heads, dim], until the next step."""
        prefix = self._prepared[slot].prefix
        return prefix.keys[layer], prefix.values[layer]
