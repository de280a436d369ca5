"""ModelRunner: a batch of sequences -> the tensors of one step -> logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deltaserve.kernels.attention.cpu_step import cells_of
from deltaserve.kernels.attention.step import Span
from deltaserve.kernels.primitives import PrefixKV, PromptEmbeddings
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.server.engine.batch import Batch, Scheduled
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.model.context import ForwardContext, KVStore


class Model(Protocol):
    """What the runner must know of the model."""

    ctx: ForwardContext

    def forward(self, input_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor: ...


@dataclass(slots=True)
class LogitRow:
    """A row of a step's logits: what follows token `position` of the part's sequence."""

    part: Scheduled
    position: int

    @property
    def samples(self) -> bool:
        return self.position >= len(self.part.sequence.tokens) - 1


class ModelRunner:
    def __init__(self, model: Model, kv: KVStore) -> None:
        self.model = model
        self.kv = kv
        self.model.ctx.kv = kv

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[list[LogitRow], Tensor]:
        """-> (rows, logits float32 [rows, vocabulary])."""
        for sequence, start, count in batch.fills:
            self._fill(sequence, start, count)
        parts = batch.parts
        rows, logit_rows, at = [], [], 0
        ids: list[int] = []
        positions: list[int] = []
        for part in parts:
            ids += part.tokens
            positions += range(part.start, part.start + part.count)
            for position in _wanted(part):
                rows.append(LogitRow(part, position))
                logit_rows.append(at + position - part.start)
            at += part.count
        ctx = self.model.ctx
        ctx.segments = _segments([(p.count, p.mix) for p in parts])
        ctx.logit_segments = _segments([(1, r.part.mix) for r in rows])
        device = ctx.backend.device
        input_ids = torch.tensor(ids, device=device)
        ctx.embedding_override = _override(parts, device)
        if ctx.embedding_override is not None:
            input_ids.clamp_(min=0)
        spans = [Span(p.start, p.count, p.sequence.blocks) for p in parts]
        ctx.attention = ctx.backend.attention(spans, len(batch.decodes), self.kv.block_size)
        # a step of prompt chunks may want no logits; the head is not made for zero rows
        wanted = torch.tensor(logit_rows or [0], device=device)
        logits = self.model.forward(input_ids, torch.tensor(positions, device=device), wanted)
        return rows, logits[: len(rows)]

    def scrub(self, blocks: list[int]) -> None:
        """Zero what a failed sequence left behind: a NaN would pass through masked attention."""
        cells = self._cells(blocks, 0, len(blocks) * self.kv.block_size)
        for layer in (*self.kv.keys.values(), *self.kv.values.values()):
            layer[self.kv.index(layer, cells)] = 0

    def _fill(self, sequence: Sequence, start: int, count: int) -> None:
        """Write the given keys and values of a prefix-tuned adapter's virtual tokens."""
        prefix = sequence.prefix
        assert isinstance(prefix, PrefixKV)
        cells = self._cells(sequence.blocks, start, start + count)
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            store = self.kv.keys[layer], self.kv.values[layer]
            for held, given in zip(store, (keys, values), strict=True):
                held[self.kv.index(held, cells)] = given[start : start + count].to(
                    held.device, held.dtype
                )

    def _cells(self, blocks: list[int], start: int, end: int) -> Tensor:
        """int64 [end - start]: the cells of tokens [start, end) of a sequence with these blocks."""
        cells = cells_of(np.array(blocks), self.kv.block_size, start, end)
        return torch.from_numpy(cells).to(self.model.ctx.backend.device)


def _segments(parts: list[tuple[int, Mix]]) -> Segments:
    """From (number of tokens, mix) of each part in order."""
    runs: list[tuple[int, int, Mix]] = []
    at = 0
    for count, mix in parts:
        if mix and runs and runs[-1][1] == at and runs[-1][2] == mix:
            runs[-1] = (runs[-1][0], at + count, mix)
        elif mix:
            runs.append((at, at + count, mix))
        at += count
    return Segments(runs, at)


def _wanted(part: Scheduled) -> Iterable[int]:
    """Positions of the part whose logits are needed."""
    sequence, end = part.sequence, part.start + part.count
    score_from = sequence.request.sampling.score_from
    if score_from is not None and sequence.outputs == 0:
        first = sequence.virtual + score_from - 1 + len(sequence.lead.scores)
        yield from range(max(first, part.start), min(end, sequence.prompt_end - 1))
    if part.sample:
        yield end - 1


def _override(parts: list[Scheduled], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(rows, embeddings) of the step's virtual tokens."""
    rows: list[int] = []
    values = []
    at = 0
    for part in parts:
        prefix = part.sequence.prefix
        if isinstance(prefix, PromptEmbeddings) and part.start < len(prefix):
            count = min(part.start + part.count, len(prefix)) - part.start
            rows += range(at, at + count)
            values.append(prefix.embeddings[part.start : part.start + count])
        at += part.count
    if not rows:
        return None
    return torch.tensor(rows, device=device), torch.cat(values).to(device)
