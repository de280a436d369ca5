"""Stacks: the groups of a model by their shape, and a step's plans, made once for each shape."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeAlias

from deltaserve.kernels.gpu import step
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.reserved import Family, Reserved
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group

Plans: TypeAlias = Mapping[int, StepPlan | None]
"""By the id of a group."""


class Stacks:
    """Over one arena. The first group that is asked in a step has all planned that any step has
    asked for, and brought to the device in one copy; the plans are kept with the step's segments,
    and for steps that have the same ones. A captured step has its own."""

    def __init__(self) -> None:
        self._groups: dict[Group, list[GpuLinearDeltas]] = {}
        self._stacks: dict[Group, LayerPlans] = {}
        self._asked: dict[Hashable, Family] = {}
        self._of: object = None
        self._kept: dict[Hashable, Plans] = {}

    def add(self, deltas: GpuLinearDeltas) -> None:
        """One more group."""
        self._groups.setdefault(deltas.group, []).append(deltas)
        self._stacks.pop(deltas.group, None)
        self._asked.clear()

    def plan(
        self, deltas: GpuLinearDeltas, base: GpuLinear, segments: Segments, gated: bool = False
    ) -> StepPlan | None:
        """The step's plan for a group; None if no adapter of the step acts on it. gated: `run` will
        be given an activation."""
        captured = isinstance(segments, Reserved)
        if not captured and deltas.slots.keys().isdisjoint(segments.slots):
            return None
        weights = base.weights
        key = (deltas.group, weights.key(gated), weights.whole_zeros)
        found: Plans | None = segments.plans.get(key)
        if found is None:
            family = Family(self._stack(deltas.group), base, gated)
            if isinstance(segments, Reserved):
                groups = map(id, family.layers.layers)
                found = dict(zip(groups, segments.reserved(key, family), strict=True))
                segments.plans[key] = found
            else:
                self._asked[key] = family
                self._plan(segments)
                found = segments.plans[key]
        return found[id(deltas)]

    def _stack(self, group: Group) -> LayerPlans:
        if group not in self._stacks:
            self._stacks[group] = LayerPlans(self._groups[group])
        return self._stacks[group]

    def _plan(self, segments: Segments) -> None:
        """All that was asked for and the step has not."""
        versions = [self._stack(group).residents.version for group in self._groups]
        of = segments.runs, segments.tokens, versions
        if self._of != of:
            self._of, self._kept = of, {}
        there = self._kept.keys() | segments.plans.keys()
        families = [(key, family) for key, family in self._asked.items() if key not in there]
        drafts = [f.layers.drafts(segments, f.base, gated=f.gated) for _, f in families]
        if families:
            device = families[0][1].layers.layers[0].device
            made = iter(step.make([draft for own in drafts for _, draft in own], device))
            for (key, family), own in zip(families, drafts, strict=True):
                plans = family.layers.spread(own, [next(made) for _ in own])
                groups = map(id, family.layers.layers)
                self._kept[key] = dict(zip(groups, plans, strict=True))
        segments.plans.update(self._kept)
