"""Stacks: the groups of a model by their shape, and a step's plans, made once for each shape."""

from __future__ import annotations

from collections.abc import Sequence

from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.reserved import Family, Reserved
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group


class Stacks:
    """Over one arena. The first group of a shape that is asked in a step has all of its shape
    planned; the plans are kept with the step's segments. A captured step has its own."""

    def __init__(self) -> None:
        self._groups: dict[Group, list[GpuLinearDeltas]] = {}
        self._stacks: dict[Group, LayerPlans] = {}

    def add(self, deltas: GpuLinearDeltas) -> None:
        """One more group."""
        self._groups.setdefault(deltas.group, []).append(deltas)
        self._stacks.pop(deltas.group, None)

    def plan(
        self, deltas: GpuLinearDeltas, base: GpuLinear, segments: Segments, gated: bool = False
    ) -> StepPlan | None:
        """The step's plan for a group; None if no adapter of the step acts on it. gated: `run` will
        be given an activation."""
        captured = isinstance(segments, Reserved)
        if not captured and deltas.slots.keys().isdisjoint(segments.slots):
            return None
        weights, layers = base.weights, self._groups[deltas.group]
        key = (deltas.group, weights.key(gated), weights.whole_zeros)
        found: dict[int, StepPlan | None] | None = segments.plans.get(key)
        if found is None:
            stack = self._stacks.setdefault(deltas.group, LayerPlans(layers))
            plans: Sequence[StepPlan | None]
            if isinstance(segments, Reserved):
                plans = segments.reserved(key, Family(stack, base, gated))
            else:
                plans = stack.plan(segments, base, gated=gated)
            found = {id(d): plan for d, plan in zip(layers, plans, strict=True)}
            segments.plans[key] = found
        return found[id(deltas)]
