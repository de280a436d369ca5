"""ModelRunner: a batch of sequences -> the tensors of one step -> logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from deltaserve.kernels.attention.cpu_step import cells_of
from deltaserve.kernels.attention.step import Span
from deltaserve.kernels.captured import DecodeStep, Graphs, StepTensors, best_of
from deltaserve.kernels.primitives import PrefixKV, PromptEmbeddings
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.server.engine.ahead import next_decodes
from deltaserve.server.engine.batch import Batch, Scheduled
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.model.context import ForwardContext, KVStore


class Model(Protocol):
    """What the runner must know of the model."""

    ctx: ForwardContext
    vocab_size: int
    max_length: int

    @property
    def by_row(self) -> Collection[int]: ...

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        into: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(slots=True)
class LogitRow:
    """A row of a step's logits: what follows token `position` of the part's sequence."""

    part: Scheduled
    position: int

    @property
    def samples(self) -> bool:
        return self.position >= len(self.part.sequence.tokens) - 1


class StepResult(NamedTuple):
    """rows: whose logits there are. logits: float32 [rows, vocabulary], until the next step. best:
    as `best_of` the logits, in host memory, if a token is chosen after every row by itself."""

    rows: list[LogitRow]
    logits: Tensor
    best: Tensor | None = None


class ModelRunner:
    """replays: steps that were launched as graphs so far."""

    def __init__(self, model: Model, kv: KVStore) -> None:
        self.model = model
        self.kv = kv
        self.model.ctx.kv = kv
        self.replays = 0
        self._graphs: Graphs | None = None

    @torch.inference_mode()
    def capture(self, most: int, progress: Callable[[float, str], None]) -> None:
        """From now on decoding steps of up to `most` tokens are replayed from graphs, where the
        backend has such. Before the first step."""
        self._graphs = self.model.ctx.backend.graphs(
            self._forward,
            vocabulary=self.model.vocab_size,
            most=most,
            max_length=self.model.max_length,
            block_size=self.kv.block_size,
            progress=progress,
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Returns when the step is over. While it runs, the next one is laid out."""
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
        alone = all(row.samples and row.part.sequence.group is None for row in rows)
        segments = _segments([(p.count, p.mix) for p in parts])
        decoded = None
        if self._graphs is not None and logit_rows == list(range(len(parts))) == list(range(at)):
            decoded = self._replay(self._graphs, parts, ids, positions, segments)
        if decoded is not None:
            logits, best = decoded
            self.replays += 1
        else:
            logits = self._launch(batch, rows, logit_rows, ids, positions, segments)
            best = best_of(logits) if alone else logits[:0]
        fetched = self.model.ctx.backend.fetch(best)
        if self._graphs is not None:
            self._prepare(self._graphs, batch)
        found = fetched()
        return StepResult(rows, logits, found if alone else None)

    def _launch(
        self,
        batch: Batch,
        rows: list[LogitRow],
        logit_rows: list[int],
        ids: list[int],
        positions: list[int],
        segments: Segments,
    ) -> Tensor:
        """Kernel by kernel."""
        parts, ctx = batch.parts, self.model.ctx
        ctx.segments = segments
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
        return logits[: len(rows)]

    def _forward(self, step: StepTensors) -> None:
        """What is captured: every row is a sequence's newest token, or a draft."""
        ctx = self.model.ctx
        ctx.segments = ctx.logit_segments = step.segments
        ctx.embedding_override = None
        ctx.attention = step.attention
        self.model.forward(step.ids, step.positions, step.rows, step.logits)

    def _replay(
        self,
        graphs: Graphs,
        parts: list[Scheduled],
        ids: list[int],
        positions: list[int],
        segments: Segments,
    ) -> tuple[Tensor, Tensor] | None:
        if min(ids) < 0 or not segments.slots.isdisjoint(self.model.by_row):
            return None
        blocks = [part.sequence.blocks for part in parts]
        return graphs.run(DecodeStep(ids, positions, blocks, segments))

    def _prepare(self, graphs: Graphs, batch: Batch) -> None:
        parts = next_decodes(batch)
        segments = _segments([(1, part.mix) for part in parts])
        if parts and segments.slots.isdisjoint(self.model.by_row):
            ids, blocks = [0] * len(parts), [part.sequence.blocks for part in parts]
            graphs.prepare(DecodeStep(ids, [part.start for part in parts], blocks, segments))

    def works(self) -> bool:
        """Whether there can be another step, after one that failed."""
        return self.model.ctx.backend.works()

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
