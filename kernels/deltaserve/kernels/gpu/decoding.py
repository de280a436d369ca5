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
from deltaserve.kernels.gpu.graph import StaticStep
from deltaserve.kernels.gpu.graphs import GraphTable, default_limits
from deltaserve.kernels.gpu.reserved import Family, Reserved
from deltaserve.kernels.gpu.step import Limits, StepPlan
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.segments import Segments

log = logging.getLogger(__name__)


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of tokens that steps of up to `most` are padded to; steps of more than the largest
    take long enough without graphs."""
    return tuple(n for n, before in zip(BUCKETS, (0, *BUCKETS), strict=False) if before < most)


class DecodeGraphs:
    """forward: computes a step of the model. Other arguments as `GraphTable` has them. Raises
    NotCapturable."""

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
        limits: Callable[[int, int], Limits] = default_limits,
        progress: Callable[[float, str], None] = lambda share, what: None,
    ) -> None:
        sizes, device = buckets(most), workspace.device
        self._forward = forward
        self._rows = torch.arange(sizes[-1], device=device)
        self._logits = torch.zeros(sizes[-1], vocabulary, dtype=torch.float32, device=device)
        self._best = torch.zeros(sizes[-1], 2, dtype=torch.int64, device=device)
        self._table = GraphTable(
            self._launch,
            self._families(max_length, block_size, device),
            capture,
            limits=limits,
            max_length=max_length,
            block_size=block_size,
            workspace=workspace,
            buckets=sizes,
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
        segments = Reserved(tokens, partial(_given, step)) if step.plans else Segments((), tokens)
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
        self._best[:tokens].copy_(best_of(logits))
        return logits

    def _families(
        self, max_length: int, block_size: int, device: torch.device
    ) -> dict[Hashable, Family]:
        """Those whose plans a step asks for, by the name that they are asked by."""
        found: dict[Hashable, Family] = {}

        def reserved(name: Hashable, family: Family) -> Sequence[StepPlan]:
            found[name] = family
            limits = default_limits(1, family.base.out_features)
            return family.layers.reserve(1, family.base, limits, gated=family.gated).layers

        number = torch.zeros(1, dtype=torch.int64, device=device)
        tables = AttentionTables.allocate(1, max_length, block_size, 1, device)
        step = GpuStep(number - 1, tables)
        self._forward(
            StepTensors(
                number, number, self._rows[:1], step, Reserved(1, reserved), self._logits[:1]
            )
        )
        return found


def _given(step: StaticStep, name: Hashable, family: Family) -> Sequence[StepPlan]:
    if name not in step.plans:
        raise NotCapturable(f"a step of {step.tokens} tokens asks for other plans than one of 1")
    return step.plans[name]
