"""GpuEmbeddingDeltas: `EmbeddingDeltas` on the GPU: a step's whole mixed batch in one launch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.gpu.arena import NOWHERE, Arena
from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.embedding_kernel import embedding_kernel
from deltaserve.kernels.gpu.embedding_tables import EmbeddingPlan, EmbeddingRoom, EmbeddingTable
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.prepared_embedding import (
    GpuPreparedEmbedding,
    Item,
    Kind,
    prepare,
)
from deltaserve.kernels.gpu.reserved import Reserved
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.primitives import Primitive
from deltaserve.kernels.segments import Mix, Segments

BLOCK = 1024
"""Elements of a row that one program changes."""
WARPS = 4


class GpuEmbeddingDeltas:
    """vocabulary, hidden: of the embedding's weight; dtype: of y. arena: where adapters lie."""

    by_token = True

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype, arena: Arena) -> None:
        self.vocabulary = vocabulary
        self.hidden = hidden
        self.dtype = dtype
        self.arena = arena
        self._slots: dict[int, tuple[GpuPreparedEmbedding, Spot]] = {}
        self._changes = 0

    @property
    def version(self) -> tuple[int, int]:
        """The same as long as nothing is installed, removed or moved."""
        return self._changes, self.arena.moves

    def prepare(self, primitives: tuple[Primitive, ...]) -> GpuPreparedEmbedding:
        """See `prepared_embedding.prepare`."""
        return prepare(primitives, self.vocabulary, self.hidden, self.dtype)

    def install(self, slot: int, prepared: GpuPreparedEmbedding) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread. What is in
        the arena already, or was put there for another slot, is not copied again."""
        self.remove(slot)
        if prepared.nbytes:
            self._changes += 1
            self._slots[slot] = prepared, prepared.home.take(prepared.blob, self.arena)

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        if slot in self._slots:
            self._changes += 1
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
        if isinstance(segments, Reserved):
            plan = segments.embedded
        else:
            plan = self.plan(segments) if self.act(segments.slots) else None
        return y if plan is None else self.run(ids, y, weight, plan, multiplier)

    def act(self, slots: Collection[int]) -> bool:
        """Whether an adapter in one of the slots changes the embedding."""
        return not self._slots.keys().isdisjoint(slots)

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
        """The step's tables on the device, in one copy, with room for exactly this step."""
        table = self._table(segments)
        room = EmbeddingRoom(segments.tokens, len(table.items))
        memory = StaticMemory(room.count, self.arena.device)
        plan = EmbeddingPlan(room, *memory.take(room.count))
        plan.write(table)
        memory.send()
        return plan

    def reserve(self, tokens: int, items: int, memory: StaticMemory) -> EmbeddingPlan:
        """One without adapters, for `replan` to fill; what is filled in is for others to send."""
        room = EmbeddingRoom(tokens, items)
        return EmbeddingPlan(room, *memory.take(room.count))

    def replan(self, plan: EmbeddingPlan, segments: Segments) -> None:
        """Fills a plan anew. Raises StepTooLarge, and then the plan is as it was."""
        plan.write(self._table(segments))

    def _table(self, segments: Segments) -> EmbeddingTable:
        found = EmbeddingTable()
        for start, end, mix in segments.runs:
            if mix not in found.rows:
                own = list(self._items(mix))
                if not own:
                    continue
                found.add(mix, own)
            found.runs.append((start, end, found.rows[mix]))
        return found

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
                    index=NOWHERE if item.index == NOWHERE else at + item.index,
                    rows=at + item.rows,
                    matrix=at + item.matrix,
                ),
                strength * item.scale,
            )


def constants(hidden: int) -> dict[str, Any]:
    """The kernel's constants."""
    return {"K": hidden, "BLOCK": BLOCK}
