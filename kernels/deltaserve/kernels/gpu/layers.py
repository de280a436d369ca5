"""LayerPlans: a step planned once for all layers whose adapters have one structure."""

from __future__ import annotations

from collections.abc import Sequence

from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.config import AuxConfig, GemmConfig
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.prepared import GpuPrepared
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import Limits, StepPlan, StepTooLarge
from deltaserve.kernels.segments import Segments


class LayerPlans:
    """layers: groups of one shape, of the same place in every layer (all q, k and v, say), over one
    arena.

    Planning takes Python's time once per structure, not per layer: layers whose adapters differ in
    where their blobs lie alone share one plan, but for its offsets. Adapters with other ranks or
    another number of entries in some layers cost a plan for each kind of layer.
    """

    def __init__(self, layers: Sequence[GpuLinearDeltas]) -> None:
        if len({(deltas.group, id(deltas.arena)) for deltas in layers}) != 1:
            raise ValueError("layers that share plans must be of one shape and over one arena")
        self.layers = tuple(layers)
        self._changes = -1
        self._kinds: dict[int, tuple[tuple[GpuPrepared | None, ...], tuple[int, ...]]] = {}
        self._checked: set[int] = set()

    def plan(
        self,
        segments: Segments,
        base: GpuLinear,
        *,
        config: GemmConfig | None = None,
        aux: AuxConfig | None = None,
        gated: bool = False,
    ) -> list[StepPlan | None]:
        """The step's plan for each layer; None for one that no adapter of the step acts on. base:
        of any layer; they are alike."""
        found: list[StepPlan | None] = [None] * len(self.layers)
        for kind in self._by_kind(segments):
            first = self.layers[kind[0]]
            if segments.slots.isdisjoint(first.slots):
                continue
            spots = [self.layers[i].spots for i in kind]
            made = first.plan_for(spots, segments, base, None, config, aux, gated)
            for i, plan in zip(kind, made.layers, strict=True):
                found[i] = plan
        return found

    def reserve(
        self,
        tokens: int,
        base: GpuLinear,
        limits: Limits,
        *,
        config: GemmConfig | None = None,
        gated: bool = False,
        memory: StaticMemory | None = None,
    ) -> StepPlan:
        """A plan without adapters for steps of `tokens` tokens, for `replan` to fill; its `layers`
        are those of this. memory: as in `step.make`."""
        spots = [deltas.spots for deltas in self.layers]
        empty = Segments((), tokens)
        return self.layers[0].plan_for(spots, empty, base, limits, config, None, gated, memory)

    def replan(self, plan: StepPlan, segments: Segments) -> None:
        """Fills what `reserve` made. Raises StepTooLarge, also where layers differ in structure,
        and then the plan is as it was."""
        kinds = self._by_kind(segments)
        if len(kinds) > 1:
            raise StepTooLarge(f"the step's adapters have {len(kinds)} structures of a layer")
        self.layers[0].replan(plan, segments, [deltas.spots for deltas in self.layers])

    def _by_kind(self, segments: Segments) -> list[list[int]]:
        """Layers (by number) of the same structure, for this step's adapters."""
        slots = sorted(segments.slots)
        kinds = [self._kinds_of(slot) for slot in slots]
        found: dict[tuple[int, ...], list[int]] = {}
        if not any(map(any, kinds)):
            return [list(range(len(self.layers)))]
        for i, key in enumerate(zip(*kinds, strict=True)):
            found.setdefault(key, []).append(i)
        return list(found.values())

    def _kinds_of(self, slot: int) -> tuple[int, ...]:
        """Of each layer, the first one in which the slot's adapter has the same structure."""
        changes = sum(deltas.changes for deltas in self.layers)
        if changes != self._changes:
            self._changes = changes
            self._checked.clear()
        if slot not in self._checked:
            own = tuple(deltas.prepared.get(slot) for deltas in self.layers)
            known = self._kinds.get(slot)
            if known is None or any(a is not b for a, b in zip(known[0], own, strict=True)):
                self._kinds[slot] = own, _kinds(own)
            self._checked.add(slot)
        return self._kinds[slot][1]


def _kinds(prepared: Sequence[GpuPrepared | None]) -> tuple[int, ...]:
    parts = [None if p is None else p.parts for p in prepared]
    firsts: list[int] = []
    found = []
    for i, own in enumerate(parts):
        same = next((j for j in firsts if parts[j] == own), None)
        if same is None:
            firsts.append(i)
        found.append(i if same is None else same)
    return tuple(found)
