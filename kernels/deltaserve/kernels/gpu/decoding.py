"""A model's decoding steps, captured: what it asks of its linears' plans is found out by running it
once, then there is a graph for each number of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.captured import Decoded, DecodeStep, StepTensors, best_of
from deltaserve.kernels.gpu.capture import Capture, NotCapturable
from deltaserve.kernels.gpu.config import BUCKETS
from deltaserve.kernels.gpu.embedding import GpuEmbeddingDeltas
from deltaserve.kernels.gpu.graph import StaticStep
from deltaserve.kernels.gpu.graphs import GraphTable, default_limits
from deltaserve.kernels.gpu.norm_plans import NormPlans
from deltaserve.kernels.gpu.norm_tables import NormPlan, NormRoom, Tuned
from deltaserve.kernels.gpu.reserved import Family, Reserved
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import Limits, StepPlan
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.segments import Segments

log = logging.getLogger(__name__)


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of tokens that steps of up to `most` are padded to; steps of more than the largest
    take long enough without graphs."""
    return tuple(n for n, before in zip(BUCKETS, (0, *BUCKETS), strict=False) if before < most)


class DecodeGraphs:
    """forward: computes a step of the model, which `norms` and `embedding` are of. Other arguments
    as `GraphTable` has them. Raises NotCapturable."""

    def __init__(
        self,
        forward: Callable[[StepTensors], None],
        capture: Capture,
        workspace: Workspace,
        *,
        vocabulary: int,
        most: int,
        max_length: int,
        block_size: int,
        norms: NormPlans,
        embedding: GpuEmbeddingDeltas | None,
        limits: Callable[[int, int], Limits] = default_limits,
        progress: Callable[[float, str], None] = lambda share, what: None,
    ) -> None:
        sizes, device = buckets(most), workspace.device
        self._forward = forward
        self._norms = norms
        self._rows = torch.arange(sizes[-1], device=device)
        self._logits = torch.zeros(sizes[-1], vocabulary, dtype=torch.float32, device=device)
        self._best = torch.zeros(sizes[-1], 2, dtype=torch.int64, device=device)
        families, self._captured = self._asked(max_length, block_size, device)
        self._table = GraphTable(
            self._launch,
            families,
            capture,
            limits=limits,
            max_length=max_length,
            block_size=block_size,
            workspace=workspace,
            buckets=sizes,
            norms=norms,
            captured=self._captured,
            embedding=embedding,
        )
        self._table.capture(
            lambda done, count, what: progress(done / count, f"capturing steps of {what}")
        )

    @property
    def nbytes(self) -> int:
        """On the device, but for what is between a graph's inputs and outputs."""
        own = (self._rows, self._logits, self._best)
        return self._table.nbytes + sum(t.nbytes for t in own)

    def run(self, step: DecodeStep) -> Decoded | None:
        """See `Graphs`."""
        logits = self._table.run(step)
        return None if logits is None else Decoded(logits, self._best[: len(logits)])

    def prepare(self, step: DecodeStep) -> None:
        """See `Graphs`."""
        self._table.prepare(step)

    def _launch(self, step: StaticStep) -> Tensor:
        tokens = step.tokens
        asked: set[int] = set()
        segments = Segments((), tokens)
        if step.plans or step.norms is not None or step.embedding is not None:
            tuned = partial(_tuned, step.norms, asked)
            segments = Reserved(tokens, partial(_given, step), tuned, step.embedding)
        logits = self._logits[:tokens]
        self._forward(
            StepTensors(
                step.ids,
                step.positions,
                self._rows[:tokens],
                GpuStep(step.cells, step.attention),
                segments,
                logits,
            )
        )
        if isinstance(segments, Reserved) and asked != self._captured:
            raise NotCapturable(f"a step of {tokens} tokens asks for other norms than one of 1")
        self._best[:tokens].copy_(best_of(logits))
        return logits

    def _asked(
        self, max_length: int, block_size: int, device: torch.device
    ) -> tuple[dict[Hashable, Family], set[int]]:
        """Families whose plans a step asks for, by the name that they are asked by; and norms."""
        found: dict[Hashable, Family] = {}
        norms: set[int] = set()
        room = NormRoom(1, 0, self._norms.norms)
        plan = self._norms.reserve(1, 0, StaticMemory(room.count, device))

        def reserved(name: Hashable, family: Family) -> Sequence[StepPlan]:
            found[name] = family
            limits = default_limits(1, family.base.out_features)
            return family.layers.reserve(1, family.base, limits, gated=family.gated).layers

        number = torch.zeros(1, dtype=torch.int64, device=device)
        tables = AttentionTables.allocate(1, max_length, block_size, 1, device)
        step = GpuStep(number - 1, tables)
        segments = Reserved(1, reserved, partial(_tuned, plan, norms))
        self._forward(StepTensors(number, number, self._rows[:1], step, segments, self._logits[:1]))
        return found, norms


def _given(step: StaticStep, name: Hashable, family: Family) -> Sequence[StepPlan]:
    if name not in step.plans:
        raise NotCapturable(f"a step of {step.tokens} tokens asks for other plans than one of 1")
    return step.plans[name]


def _tuned(plan: NormPlan | None, asked: set[int], norm: int) -> Tuned | None:
    asked.add(norm)
    return None if plan is None else plan.of(norm)
