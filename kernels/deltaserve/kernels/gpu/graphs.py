"""GraphTable: decoding steps replayed from graphs, one for each number of tokens that steps are
padded to, with adapters and without."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.capture import Capture
from deltaserve.kernels.gpu.config import BUCKETS
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import Limits, StepPlan, StepTooLarge
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.segments import Segments

Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token of each of some sequences (a sequence's drafts count as sequences of their own).

    ids, positions: of each token. blocks: that hold its sequence up to and with it. segments: of
    all tokens.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    blocks: Sequence[Sequence[int]]
    segments: Segments


@dataclass(eq=False, slots=True)
class StaticStep:
    """A step of `tokens` tokens as a graph reads it. ids, positions, cells: int64 [tokens].
    attention: of as many sequences of one token. plans: name -> one per layer; none without
    adapters. What pads a step is id 0 at position 0, in no cell and of no sequence."""

    tokens: int
    ids: Tensor
    positions: Tensor
    cells: Tensor
    attention: AttentionTables
    plans: Mapping[Hashable, Sequence[StepPlan]]


@dataclass(frozen=True, slots=True)
class Family:
    """Groups of one shape in every layer. base: of any of them. gated: as in `plan`."""

    layers: LayerPlans
    base: GpuLinear
    gated: bool = False


@dataclass(eq=False, slots=True)
class _Graph:
    step: StaticStep
    memory: StaticMemory
    words: Words
    longs: npt.NDArray[np.int64]
    plans: Mapping[Hashable, StepPlan]
    replay: Callable[[], Tensor] | None = None
    keeps: tuple[Tensor, ...] = field(default=())


class GraphTable:
    """forward: launches a step, reading nothing but `StaticStep`, the base, the cache and the
    arena, and returns a row for each token. families: by name. limits: what a step's adapters may
    take, by bucket. max_length: cells of a sequence at most. buckets: ascending.

    A step that nothing was captured for, or whose adapters need more than the limits, is for the
    caller to run without a graph. The arena must not grow.
    """

    def __init__(
        self,
        forward: Callable[[StaticStep], Tensor],
        families: Mapping[Hashable, Family],
        capture: Capture,
        *,
        limits: Callable[[int], Limits],
        max_length: int,
        block_size: int,
        workspace: Workspace,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        if any(d.arena.grows for family in families.values() for d in family.layers.layers):
            raise ValueError("graphs keep addresses in the arena: it must not grow")
        self._forward = forward
        self._families = families
        self._capture = capture
        self._limits = limits
        self._max_length = max_length
        self._block_size = block_size
        self._workspace = workspace
        self._buckets = tuple(buckets)
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    def capture(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """The largest first, so that the memory they share is taken once. progress: called with
        (done, all, which) before each."""
        keys = [(n, adapters) for n in reversed(self._buckets) for adapters in (True, False)]
        keys = [key for key in keys if self._families or not key[1]]
        for done, (tokens, adapters) in enumerate(keys):
            what = f"{tokens} tokens{' with adapters' if adapters else ''}"
            if progress is not None:
                progress(done, len(keys), what)
            graph = self._graph(tokens, adapters)
            self._send(graph, _nothing(tokens))
            graph.replay = self._capture(partial(self._forward, graph.step))
            graph.keeps = self._workspace.buffers()
            self._graphs[tokens, adapters] = graph

    def run(self, step: DecodeStep) -> Tensor | None:
        """A row for each of the step's tokens, valid until the next step; None if no graph fits.
        The step before must have been waited for."""
        count = len(step.ids)
        tokens = next((n for n in self._buckets if n >= count), None)
        adapters = any(
            not step.segments.slots.isdisjoint(deltas.slots)
            for family in self._families.values()
            for deltas in family.layers.layers
        )
        graph = None if tokens is None else self._graphs.get((tokens, adapters))
        if not count or graph is None or max(step.positions) >= self._max_length:
            return None
        try:
            self._send(graph, step)
        except StepTooLarge:
            return None
        assert graph.replay is not None
        return graph.replay()[:count]

    def _send(self, graph: _Graph, step: DecodeStep) -> None:
        """Raises StepTooLarge before anything is sent."""
        tokens, count, size = graph.step.tokens, len(step.ids), self._block_size
        segments = Segments(step.segments.runs, tokens)
        for name, plan in graph.plans.items():
            self._families[name].layers.replan(plan, segments)
        positions = np.array(step.positions, dtype=np.int64)
        used = positions // size + 1
        words, longs, width = graph.words, graph.longs, graph.step.attention.tables.shape[1]
        longs[:2] = 0
        longs[2] = -1
        longs[0, :count], longs[1, :count] = step.ids, positions
        words[0] = count
        words[1 : tokens + 2] = np.minimum(np.arange(tokens + 1), count)
        words[tokens + 2 :][:count] = positions + 1
        table = words[2 * tokens + 2 :].reshape(tokens, width)
        for i, blocks in enumerate(step.blocks):
            table[i, : used[i]] = blocks[: used[i]]
        last = table[np.arange(count), used - 1].astype(np.int64)
        longs[2, :count] = last * size + positions % size
        graph.memory.send()

    def _graph(self, tokens: int, adapters: bool) -> _Graph:
        device = self._workspace.device
        width = -(-self._max_length // self._block_size)
        sizes = (3 * 2 * tokens, 2 + tokens * (2 + width))
        families = self._families if adapters else {}
        room = sum(n + -n % 4 for n in sizes)
        for family in families.values():  # made twice: only then is their size known
            count = self._reserve(family, tokens, None).buffer.numel()
            room += count + -count % 4
        memory = StaticMemory(room, device)
        (long, long_out), (word, word_out) = (memory.take(n) for n in sizes)
        ids, positions, cells = long_out.view(torch.int64).view(3, tokens)
        parts = torch.split(word_out, [1, tokens + 1, tokens, tokens * width])
        tables = parts[3].view(tokens, width)
        attention = AttentionTables(
            parts[0], parts[1], parts[2], tables, self._block_size, 1, self._max_length
        )
        plans = {n: self._reserve(family, tokens, memory) for n, family in families.items()}
        layers = {name: plan.layers for name, plan in plans.items()}
        step = StaticStep(tokens, ids, positions, cells, attention, layers)
        longs = long.view(torch.int64).view(3, tokens).numpy()
        return _Graph(step, memory, word.numpy(), longs, plans)

    def _reserve(self, family: Family, tokens: int, memory: StaticMemory | None) -> StepPlan:
        limits = self._limits(tokens)
        return family.layers.reserve(tokens, family.base, limits, gated=family.gated, memory=memory)


def _nothing(tokens: int) -> DecodeStep:
    return DecodeStep((), (), (), Segments((), tokens))


def default_limits(tokens: int) -> Limits:
    """Room for a distinct adapter on every token, of rank 64 on three modules, or of rank 128 on
    half of them, and for 1-bit and sparse ones on a quarter of them. planes: of `tokens` by all
    outputs in float32 each, which is memory: the fewer, the more tokens there are."""
    deltas = 4 + tokens // 4
    return Limits(
        width=384,
        planes=8 if tokens <= 32 else 4 if tokens <= 128 else 2,
        items=5000 + 8 * tokens,
        pages=64 + 24 * tokens,
        vectors=64 + 16 * tokens,
        entries=64 + 8 * deltas,
    )
