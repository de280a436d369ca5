"""Teacher-forced logits of a `BaseModel`, with or without an adapter, as the engine computes them:
the same linears, the same packed primitives, the same `Segments`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.kernels.attention.step import Span
from deltaserve.kernels.segments import EMPTY, Segments
from deltaserve.server.compress.calibration import Sample
from deltaserve.server.engine.kv_pool import KVPool
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.model import BaseModel

STEP_TOKENS = 2048
LOGIT_BYTES = 256 << 20
"""Most bytes of float32 logits in one step, unless one sequence alone needs more."""
SLOT = 1


class Forward:
    """Runs whole sequences, several in a step, each from its first token. Owns the model's cache,
    which nothing is read from: it is as large as the longest step."""

    def __init__(self, model: BaseModel, samples: Sequence[Sample]) -> None:
        self.model = model
        self.samples = samples
        self.steps = list(_steps(samples, LOGIT_BYTES // (4 * model.vocab_size)))
        longest = max(sum(len(samples[i].ids) for i in step) for step in self.steps)
        model.ctx.kv = KVPool(model.attention, longest, 1, model.dtype, Ledger(0)).store

    def logits(self, *, adapted: bool) -> Iterator[tuple[int, Tensor]]:
        """(number of the sample, float32 [scored tokens, vocabulary]); row i is what precedes the
        sample's i-th scored token. adapted: with what `installed` installed."""
        mix = ((SLOT, 1.0),) if adapted else ()
        for step in self.steps:
            chosen = [self.samples[i] for i in step]
            counts = [sample.scored for sample in chosen]
            rows = self._run(chosen, mix)
            yield from zip(step, torch.split(rows, counts), strict=True)

    def _run(self, chosen: Sequence[Sample], mix: tuple[tuple[int, float], ...]) -> Tensor:
        ids, positions, wanted, spans, at = [], [], [], list[Span](), 0
        for sample in chosen:
            n = len(sample.ids)
            ids.append(sample.ids)
            positions.append(torch.arange(n))
            wanted.append(torch.arange(at + sample.start - 1, at + n - 1))
            spans.append(Span(0, n, range(at, at + n)))
            at += n
        rows = torch.cat(wanted)
        ctx = self.model.ctx
        ctx.attention = ctx.backend.attention(spans, 0, 1)
        ctx.embedding_override = None
        ctx.segments = Segments([(0, at, mix)], at) if mix else EMPTY
        ctx.logit_segments = Segments([(0, len(rows), mix)], len(rows)) if mix else EMPTY
        return self.model.forward(torch.cat(ids), torch.cat(positions), rows)


@contextmanager
def installed(model: BaseModel, adapter: Adapter) -> Iterator[None]:
    """The adapter in the one slot that `Forward` uses, as long as the ``with`` lasts."""
    model.install(SLOT, model.prepare(adapter))
    try:
        yield
    finally:
        model.remove(SLOT)


def _steps(samples: Sequence[Sample], most_rows: int) -> Iterator[list[int]]:
    """Numbers of the samples that share a step."""
    step, tokens, rows = list[int](), 0, 0
    for i, sample in enumerate(samples):
        tokens, rows = tokens + len(sample.ids), rows + sample.scored
        if step and (tokens > STEP_TOKENS or rows > most_rows):
            yield step
            step, tokens, rows = [], len(sample.ids), sample.scored
        step.append(i)
    if step:
        yield step
