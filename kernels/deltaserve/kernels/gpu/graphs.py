"""GraphTable: decoding steps replayed from graphs, for each number of tokens that steps are padded
to: without adapters, with plain ones, with any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product

from torch import Tensor

from deltaserve.kernels.captured import DecodeStep
from deltaserve.kernels.gpu.capture import Capture
from deltaserve.kernels.gpu.config import BUCKETS
from deltaserve.kernels.gpu.embedding import GpuEmbeddingDeltas
from deltaserve.kernels.gpu.graph import Graph, StaticStep
from deltaserve.kernels.gpu.norm_plans import NormPlans
from deltaserve.kernels.gpu.reserved import Family
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import Limits, StepPlan, StepTooLarge
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.segments import Segments

PLANE_BYTES = 64 << 20
"""That the planes of one group may take."""


@dataclass(eq=False, slots=True)
class _Captured:
    """everything, plain: replays of the graph's steps; without adapters there is one. Both read the
    tables that the host fills, of which only one is replayed at a time."""

    graph: Graph
    everything: Callable[[], Tensor]
    plain: Callable[[], Tensor] | None = None


class GraphTable:
    """forward: launches a step, reading nothing but `StaticStep`, the base, the cache and the
    arena, and returns a row for each token. families: by name. limits: what a step's adapters may
    take, by bucket and the outputs of a group. norms: of the model; captured: numbers of those that
    `forward` runs as their plan says; vectors: that a step's adapters may have for them, by bucket.
    embedding: of the model, if adapters may change it; items: likewise, of rows and matrices.
    max_length: cells of a sequence at most. buckets: ascending.

    A step that nothing was captured for, or whose adapters need more than the limits, is for the
    caller to run without a graph. The arena must not grow.
    """

    def __init__(
        self,
        forward: Callable[[StaticStep], Tensor],
        families: Mapping[Hashable, Family],
        capture: Capture,
        *,
        limits: Callable[[int, int], Limits],
        max_length: int,
        block_size: int,
        workspace: Workspace,
        buckets: Sequence[int] = BUCKETS,
        norms: NormPlans | None = None,
        captured: Collection[int] = (),
        vectors: Callable[[int], int] | None = None,
        embedding: GpuEmbeddingDeltas | None = None,
        items: Callable[[int], int] | None = None,
    ) -> None:
        self._groups = tuple(chain.from_iterable(f.layers.layers for f in families.values()))
        if any(deltas.arena.grows for deltas in self._groups):
            raise ValueError("graphs keep addresses in the arena: it must not grow")
        self._forward = forward
        self._families = families
        self._capture = capture
        self._limits = limits
        self._max_length = max_length
        self._block_size = block_size
        self._workspace = workspace
        self._buckets = tuple(buckets)
        self._all_norms = norms
        self._norms = norms if captured else None
        self._elsewhere = set(range(norms.norms)) - set(captured) if norms else set()
        self._vectors = vectors or norm_vectors
        self._embedding = embedding
        self._items = items or embedding_items
        self._graphs: dict[tuple[int, bool], _Captured] = {}
        self._keeps: list[tuple[Tensor, ...]] = []

    def capture(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """The largest first, so that the memory they share is taken once. progress: called with
        (done, all, which) before each. Raises NotCapturable."""
        adapted = self._families or self._norms or self._embedding
        kinds = ("any adapters", "plain adapters", "") if adapted else ("",)
        count = len(self._buckets) * len(kinds)
        for done, (tokens, kind) in enumerate(product(reversed(self._buckets), kinds)):
            if progress is not None:
                progress(done, count, f"{tokens} tokens{kind and ' with '}{kind}")
            if kind == "plain adapters":
                found = self._graphs[tokens, True]
                found.plain = self._capture(partial(self._forward, found.graph.plain))
            else:
                graph = self._laid_out(tokens, kind != "")
                replay = self._capture(partial(self._forward, graph.step))
                self._graphs[tokens, kind != ""] = _Captured(graph, replay)
            self._keeps.append(self._workspace.buffers())

    @property
    def nbytes(self) -> int:
        """Of the steps' tables on the device, and of the workspace that the graphs keep."""
        kept = {t.data_ptr(): t.nbytes for held in self._keeps for t in held}
        return sum(found.graph.nbytes for found in self._graphs.values()) + sum(kept.values())

    def run(self, step: DecodeStep) -> Tensor | None:
        """A row for each of the step's tokens, valid until the next step; None if no graph fits.
        The step before must have been waited for."""
        found = self._find(step)
        if found is None:
            return None
        try:
            plain = found.graph.send(step, self._state())
        except StepTooLarge:
            return None
        replay = found.plain if plain and found.plain else found.everything
        return replay()[: len(step.ids)]

    def prepare(self, step: DecodeStep) -> None:
        """Lays out a step that is likely to come, while the last one runs: of its ids nothing is
        known yet, and blocks may be missing."""
        found = self._find(step)
        if found is None:
            return
        try:
            found.graph.prepare(step, self._state())
        except StepTooLarge:
            return

    def _find(self, step: DecodeStep) -> _Captured | None:
        count = len(step.ids)
        tokens = next((n for n in self._buckets if n >= count), None)
        if not count or tokens is None or max(step.positions) >= self._max_length:
            return None
        slots, norms = step.segments.slots, self._all_norms
        if not slots:
            return self._graphs.get((tokens, False))
        if norms is not None and self._elsewhere and norms.act(slots, self._elsewhere):
            return None
        adapters = any(not d.slots.keys().isdisjoint(slots) for d in self._groups)
        adapters = adapters or (norms is not None and norms.act(slots))
        adapters = adapters or (self._embedding is not None and self._embedding.act(slots))
        return self._graphs.get((tokens, adapters))

    def _state(self) -> object:
        """Changes whenever equal segments may need other plans."""
        versions = [family.layers.residents.version for family in self._families.values()]
        others = (self._norms, self._embedding)
        return tuple(versions), *(own and own.version for own in others)

    def _laid_out(self, tokens: int, adapters: bool) -> Graph:
        graph = Graph(
            tokens,
            self._families if adapters else {},
            partial(self._reserve, tokens),
            norms=self._norms if adapters else None,
            vectors=self._vectors(tokens),
            embedding=self._embedding if adapters else None,
            items=self._items(tokens),
            max_length=self._max_length,
            block_size=self._block_size,
            device=self._workspace.device,
        )
        graph.send(_nothing(tokens), None)
        return graph

    def _reserve(self, tokens: int, family: Family, memory: StaticMemory | None) -> StepPlan:
        limits = self._limits(tokens, family.base.out_features)
        return family.layers.reserve(tokens, family.base, limits, gated=family.gated, memory=memory)


def _nothing(tokens: int) -> DecodeStep:
    return DecodeStep((), (), (), Segments((), tokens))


def embedding_items(tokens: int) -> int:
    """Room for an adapter on every token that replaces rows and adds some, say."""
    return 16 + 2 * tokens


def norm_vectors(tokens: int) -> int:
    """Room for an adapter on every token that has a gain and a bias for norms, or two of which each
    has gains."""
    return 16 + 2 * tokens


def default_limits(tokens: int, outputs: int) -> Limits:
    """Room for a distinct adapter on every token, of rank 64 on three modules, or of rank 128 on
    half of them, and for 1-bit and sparse ones on a quarter of them. planes: of `tokens` by all
    `outputs` in float32 each, which is memory: the fewer, the more of both there are."""
    deltas = 4 + tokens // 4
    planes = 8 if tokens <= 32 else 4 if tokens <= 128 else 2
    return Limits(
        width=384,
        planes=min(planes, PLANE_BYTES // (4 * max(tokens, 16) * outputs)),
        items=5000 + 8 * tokens,
        pages=64 + 24 * tokens,
        vectors=64 + 16 * tokens,
        entries=64 + 8 * deltas,
    )
