"""GpuEmbeddingDeltas: `EmbeddingDeltas` on the GPU: a step's whole mixed batch in one launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.embedding_kernel import embedding_kernel
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.prepared_embedding import (
    EVERY,
    GpuPreparedEmbedding,
    Item,
    Kind,
    prepare,
)
from deltaserve.kernels.primitives import Primitive
from deltaserve.kernels.segments import Mix, Segments

BLOCK = 1024
"""Elements of a row that one program changes."""
WARPS = 4


@dataclass(eq=False, slots=True)
class EmbeddingPlan:
    """What embedding_kernel is given of a step's adapters."""

    mixes: Tensor
    bounds: Tensor
    items: Tensor
    factors: Tensor


class GpuEmbeddingDeltas:
    """vocabulary, hidden: of the embedding's weight; dtype: of y. arena: where adapters lie."""

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype, arena: Arena) -> None:
        self.vocabulary = vocabulary
        self.hidden = hidden
        self.dtype = dtype
        self.arena = arena
        self._slots: dict[int, tuple[GpuPreparedEmbedding, Spot]] = {}

    def prepare(self, primitives: tuple[Primitive, ...]) -> GpuPreparedEmbedding:
        """See `prepared_embedding.prepare`."""
        return prepare(primitives, self.vocabulary, self.hidden, self.dtype)

    def install(self, slot: int, prepared: GpuPreparedEmbedding) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread. What is in
        the arena already, or was put there for another slot, is not copied again."""
        self.remove(slot)
        if prepared.nbytes:
            self._slots[slot] = prepared, prepared.home.take(prepared.blob, self.arena)

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        if slot in self._slots:
            prepared, spot = self._slots.pop(slot)
            prepared.home.leave(spot, self.arena)

    @property
    def nbytes(self) -> int:
        """Exact bytes installed; a blob in several slots is there once."""
        return sum({id(p.home): p.nbytes for p, _ in self._slots.values()}.values())

    def forward(
        self,
        ids: Tensor,
        y: Tensor,
        weight: Tensor,
        segments: Segments,
        multiplier: float = 1.0,
    ) -> Tensor:
        """See `EmbeddingDeltas.forward`. y, weight: contiguous."""
        if segments.slots.isdisjoint(self._slots):
            return y
        return self.run(ids, y, weight, self.plan(segments), multiplier)

    def run(
        self, ids: Tensor, y: Tensor, weight: Tensor, plan: EmbeddingPlan, multiplier: float
    ) -> Tensor:
        """The launch of a planned step."""
        if not (y.is_contiguous() and weight.is_contiguous() and ids.is_contiguous()):
            raise ValueError("ids, y and weight must be contiguous")
        if y.dtype != self.dtype or weight.dtype != self.dtype:
            raise ValueError(f"y is {y.dtype} and the weight {weight.dtype}, not {self.dtype}")
        launch(
            embedding_kernel,
            (len(ids), -(-self.hidden // BLOCK)),
            (
                ids, y, weight, self.arena.view(self.dtype), self.arena.view(torch.int32),
                plan.mixes, plan.bounds, plan.items, plan.factors, multiplier,
            ),
            constants(self.hidden),
            num_warps=WARPS,
            num_stages=1,
        )  # fmt: skip
        return y

    def plan(self, segments: Segments) -> EmbeddingPlan:
        """The step's tables on the device, in one copy."""
        rows: dict[Mix, int] = {}
        mixes = np.zeros(segments.tokens, np.int32)
        bounds, items, factors = [0, 0], list[Item](), list[float]()
        for start, end, mix in segments.runs:
            if mix not in rows:
                own = list(self._items(mix))
                if not own:
                    continue
                rows[mix] = len(rows) + 1
                items += [item for item, _ in own]
                factors += [factor for _, factor in own]
                bounds.append(len(items))
            mixes[start:end] = rows[mix]
        words = [(i.kind, i.count, i.index, i.rows, i.matrix) for i in items]
        tables = (
            mixes,
            np.array(bounds, np.int32),
            np.array(words, np.int32).reshape(-1),
            np.array(factors, np.float32).view(np.int32),
        )
        # Each at a multiple of 16 bytes, as the kernel was compiled for.
        padded = [np.pad(table, (0, -len(table) % 4)) for table in tables]
        sent = torch.from_numpy(np.concatenate(padded)).to(self.arena.device)
        mixed, bound, listed, factor = torch.split(sent, [len(table) for table in padded])
        return EmbeddingPlan(mixed, bound, listed, factor.view(torch.float32))

    def _items(self, mix: Mix) -> Iterator[tuple[Item, float]]:
        """With their factors, rows that are replaced first; they lie where they lie now."""
        own = [(*self._slots[slot], strength) for slot, strength in mix if slot in self._slots]
        found = [(item, spot.offset, w) for prepared, spot, w in own for item in prepared.items]
        replacing = [w for item, _, w in found if item.kind is Kind.REPLACED]
        for item, at, strength in sorted(found, key=lambda one: one[0].kind is not Kind.REPLACED):
            kind = Kind.EXACT if item.kind is Kind.REPLACED and replacing == [1] else item.kind
            yield (
                replace(
                    item,
                    kind=kind,
                    index=EVERY if item.index == EVERY else at + item.index,
                    rows=at + item.rows,
                    matrix=at + item.matrix,
                ),
                strength * item.scale,
            )


def constants(hidden: int) -> dict[str, Any]:
    """The kernel's constants."""
    return {"K": hidden, "BLOCK": BLOCK}
