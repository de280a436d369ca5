"""LayerPlans: a step planned once for all layers whose adapters have one structure."""

from __future__ import annotations

from collections.abc import Sequence

from deltaserve.kernels.gpu import step
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.config import AuxConfig, GemmConfig
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.residents import Residents
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import Draft, Limits, StepPlan, StepTooLarge
from deltaserve.kernels.segments import Segments


class LayerPlans:
    """layers: groups of one shape, of the same place in every layer (all q, k and v, say), over one
    arena.

    Planning takes Python's time once per structure, not per layer: layers whose adapters differ in
    where things lie alone share one plan, but for its offsets. Of a few structures each has a plan;
    of more, and where a graph has one, layers share one in which some lack what others have.
    """

    def __init__(self, layers: Sequence[GpuLinearDeltas]) -> None:
        if len({(deltas.group, id(deltas.arena)) for deltas in layers}) != 1:
            raise ValueError("layers that share plans must be of one shape and over one arena")
        self.layers = tuple(layers)
        self.residents = Residents(layers)

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
        drafts = self.drafts(segments, base, config=config, aux=aux, gated=gated)
        plans = step.make([draft for _, draft in drafts], self.layers[0].device)
        return self.spread(drafts, plans)

    def drafts(
        self,
        segments: Segments,
        base: GpuLinear,
        *,
        config: GemmConfig | None = None,
        aux: AuxConfig | None = None,
        gated: bool = False,
    ) -> list[tuple[tuple[int, ...], Draft]]:
        """As `plan`, for `step.make`: layers, by number, and what is to be their plan."""
        first = self.layers[0]
        return [
            (alike.layers, first.draft(alike, segments, base, None, config, aux, gated))
            for alike in self.residents.alike(segments)
            if alike.acts
        ]

    def spread(
        self, drafts: Sequence[tuple[tuple[int, ...], Draft]], plans: Sequence[StepPlan]
    ) -> list[StepPlan | None]:
        """Of each layer its plan."""
        found: list[StepPlan | None] = [None] * len(self.layers)
        for (layers, _), made in zip(drafts, plans, strict=True):
            for i, plan in zip(layers, made.layers, strict=True):
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
        first, empty = self.layers[0], Segments((), tokens)
        (alike,) = self.residents.alike(empty)
        draft = first.draft(alike, empty, base, limits, config, None, gated)
        return step.make([draft], first.device, memory)[0]

    def replan(self, plan: StepPlan, segments: Segments) -> Uses:
        """Fills what `reserve` made; what the step uses of that plan's `uses`. Raises StepTooLarge,
        also where an adapter has routers in some layers alone, and then the plan is as it was."""
        kinds = self.residents.alike(segments, most=1)
        if len(kinds) > 1:
            raise StepTooLarge(f"the step's adapters have {len(kinds)} structures of a layer")
        return self.layers[0].refill(plan, segments, kinds[0])
