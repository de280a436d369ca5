"""Graph: a step to be captured, and what the host tells it of the step to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.captured import DecodeStep
from deltaserve.kernels.gpu.embedding import GpuEmbeddingDeltas
from deltaserve.kernels.gpu.embedding_tables import EmbeddingPlan, EmbeddingRoom
from deltaserve.kernels.gpu.norm_plans import NormPlans
from deltaserve.kernels.gpu.norm_tables import NormPlan, NormRoom
from deltaserve.kernels.gpu.reserved import Family
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import PLAIN, StepPlan, StepTooLarge
from deltaserve.kernels.segments import Segments

SIDES = 2
"""One for the step that runs, one for the step that comes."""


@dataclass(eq=False, slots=True)
class StaticStep:
    """A step of `tokens` tokens as a graph reads it. ids, positions, cells: int64 [tokens].
    attention: of as many sequences of one token. plans: name -> one per layer; none without
    adapters. norms: of all; None if no adapter tunes one. embedding: None if no adapter changes it.
    What pads a step is id 0 at position 0, in no cell and of no sequence."""

    tokens: int
    ids: Tensor
    positions: Tensor
    cells: Tensor
    attention: AttentionTables
    plans: Mapping[Hashable, Sequence[StepPlan]]
    norms: NormPlan | None = None
    embedding: EmbeddingPlan | None = None


@dataclass(eq=False, slots=True)
class _Side:
    """What the host writes of one step. longs: int64 [3, tokens], ids, positions and cells. words:
    int32, how many sequences there are, where their tokens start, and their lengths; table:
    [width, tokens], their blocks. plans: by the family's name; norms, embedding: of those. planned:
    what these were made of (None: of nothing that is known), plain: whether they use nothing beside
    x and tune no norm; held: the blocks that the table has of each sequence."""

    longs: npt.NDArray[np.int64]
    words: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]
    plans: Mapping[Hashable, StepPlan]
    norms: NormPlan | None
    embedding: EmbeddingPlan | None
    planned: Any = None
    plain: bool = True
    held: list[list[int]] = field(default_factory=list)


class Graph:
    """A step of `tokens` tokens. reserve: a family's plan for steps of so many, in some memory.
    norms, embedding: with room for so many vectors and items; None for a step without adapters.
    step: for any adapters. plain: over the same memory, for those that use nothing beside x and
    tune no norm."""

    def __init__(
        self,
        tokens: int,
        families: Mapping[Hashable, Family],
        reserve: Callable[[Family, StaticMemory | None], StepPlan],
        *,
        norms: NormPlans | None,
        vectors: int,
        embedding: GpuEmbeddingDeltas | None,
        items: int,
        max_length: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.tokens = tokens
        self._families = families
        self._norms = norms
        self._embedding = embedding
        self._size = block_size
        width = -(-max_length // block_size)
        sizes = (3 * 2 * tokens, 2 + 2 * tokens + width * tokens)
        room = sum(n + -n % 4 for n in sizes)
        for family in families.values():  # made twice: only then is their size known
            count = reserve(family, None).buffer.numel()
            room += count + -count % 4
        if norms is not None:
            count = NormRoom(tokens, vectors, norms.norms).count
            room += count + -count % 4
        if embedding is not None:
            count = EmbeddingRoom(tokens, items).count
            room += count + -count % 4
        self._memory = StaticMemory(room, device, SIDES)
        # The plans come first, and last the sequences' blocks, the first of each and so on: what is
        # in use is one piece, with the plans or without.
        plans = {name: reserve(family, self._memory) for name, family in families.items()}
        tuned = None if norms is None else norms.reserve(tokens, vectors, self._memory)
        embedded = None
        if embedding is not None:
            embedded = embedding.reserve(tokens, items, self._memory)
        (long, long_out), (word, word_out) = map(self._memory.take, sizes)
        ids, positions, cells = long_out.view(torch.int64).view(3, tokens)
        parts = torch.split(word_out, [1, tokens + 1, tokens, width * tokens])
        attention = AttentionTables(
            parts[0], parts[1], parts[2], parts[3].view(width, tokens).T, block_size, 1, max_length
        )
        layers = {name: plan.layers for name, plan in plans.items()}
        self.step = StaticStep(tokens, ids, positions, cells, attention, layers, tuned, embedded)
        alone = {name: [replace(p, uses=PLAIN) for p in own] for name, own in layers.items()}
        self.plain = replace(self.step, plans=alone, norms=None)
        self._head, self._table = int(long.storage_offset()), int(parts[3].storage_offset())
        self._sides = [
            self._side(i, long, word, width, plans, tuned, embedded) for i in range(SIDES)
        ]
        self._next = 0
        self._sent: Any = None
        self._refused: Any = None

    @property
    def nbytes(self) -> int:
        """Of its tables on the device."""
        return self._memory.nbytes

    def send(self, step: DecodeStep, state: object) -> bool:
        """One copy to the device: the plans only if those that are there are not the step's, as
        many blocks of each sequence as the longest has. -> whether `plain` computes the step.
        state: of what is installed; as long as it is the same, equal segments have equal plans.
        Raises StepTooLarge before anything is sent."""
        side = self._lay_out(step, state)
        start = self._head if side.planned == self._sent else 0
        used = max(step.positions, default=-1) // self._size + 1
        self._memory.send(self._next, start, self._table + used * self.tokens)
        self._sent = side.planned
        self._next = (self._next + 1) % SIDES
        return side.plain

    def prepare(self, step: DecodeStep, state: object) -> None:
        """What of `send` can be done before. Raises StepTooLarge."""
        self._lay_out(step, state)

    def _lay_out(self, step: DecodeStep, state: object) -> _Side:
        side = self._sides[self._next]
        self._plan(side, step.segments, state)
        tokens, count, size = self.tokens, len(step.ids), self._size
        positions = np.array(step.positions, dtype=np.int64)
        words, longs, table = side.words, side.longs, side.table
        longs[:2] = 0
        longs[2] = -1
        longs[0, :count], longs[1, :count] = step.ids, positions
        words[0] = count
        words[1 : tokens + 2] = np.minimum(np.arange(tokens + 1), count)
        words[tokens + 2 :][:count] = positions + 1
        used = positions // size + 1
        for i, (blocks, n) in enumerate(zip(step.blocks, used.tolist(), strict=True)):
            known, given = side.held[i], list(blocks[:n])
            if known == given:
                continue
            same = len(known) if known == given[: len(known)] else 0
            table[same : len(given), i] = given[same:]
            side.held[i] = given
        last = table[used - 1, np.arange(count)].astype(np.int64)
        longs[2, :count] = last * size + positions % size
        return side

    def _plan(self, side: _Side, segments: Segments, state: object) -> None:
        if not self._families and self._norms is None and self._embedding is None:
            return
        wanted = segments.runs, state
        if side.planned == wanted:
            return
        if self._refused == wanted:
            raise StepTooLarge("as before")
        side.planned = None
        padded = Segments(segments.runs, self.tokens)
        try:
            used = [
                self._families[name].layers.replan(plan, padded)
                for name, plan in side.plans.items()
            ]
            tuned = bool(side.norms and self._norms and self._norms.replan(side.norms, padded))
            if side.embedding is not None and self._embedding is not None:
                self._embedding.replan(side.embedding, padded)
        except StepTooLarge:
            self._refused = wanted
            raise
        side.planned = wanted
        side.plain = not tuned and all(uses == PLAIN for uses in used)

    def _side(
        self, i: int, long: Tensor, word: Tensor, width: int, plans: Mapping[Hashable, StepPlan],
        norms: NormPlan | None, embedding: EmbeddingPlan | None,
    ) -> _Side:  # fmt: skip
        words, start = self._memory.on(i, word).numpy(), 2 * self.tokens + 2
        return _Side(
            self._memory.on(i, long).view(torch.int64).view(3, self.tokens).numpy(),
            words[:start],
            words[start:].reshape(width, self.tokens),
            {name: _on(plan, self._memory, i) for name, plan in plans.items()},
            norms and norms.on(self._memory.on(i, norms.staging)),
            embedding and embedding.on(self._memory.on(i, embedding.staging)),
            held=[[] for _ in range(self.tokens)],
        )


def _on(plan: StepPlan, memory: StaticMemory, side: int) -> StepPlan:
    """The same plan on the device, filled from another side."""
    return replace(plan, staging=memory.on(side, plan.staging), layers=())
