"""GpuLinearDeltas: `LinearDeltas` on the GPU: a group's whole mixed batch in two launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from deltaserve.kernels.gated.gpu import run_gates
from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu import step
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.aux import run_aux
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.config import AuxConfig, GemmConfig, aux_config
from deltaserve.kernels.gpu.gemm import Output, choose, run_gemm
from deltaserve.kernels.gpu.inputs import Inputs, Wanted, run_inputs, wanted
from deltaserve.kernels.gpu.plan import Adapters, Tables, Tiling, Uses, build
from deltaserve.kernels.gpu.prepared import GpuPrepared, prepare
from deltaserve.kernels.gpu.residents import Alike, Residents
from deltaserve.kernels.gpu.step import Draft, Limits, StepPlan
from deltaserve.kernels.gpu.sums import Sums
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.lowrank.pages import PAGE
from deltaserve.kernels.primitives import Primitive
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group

RESIDENT = 2
"""Programs of the first launch that a multiprocessor holds at once. No more are started: the base
product may overlap it only once all of them run."""


class Planner(Protocol):
    """Plans steps for several groups at once."""

    def plan(
        self, deltas: GpuLinearDeltas, base: GpuLinear, segments: Segments, gated: bool
    ) -> StepPlan | None:
        """The step's plan for a group; None if no adapter of the step acts on it. gated: `run` will
        be given an activation."""
        ...


class GpuLinearDeltas:
    """in_features; out_features of each part; dtype: of x and y.

    arena: where adapters lie; one of its own if not given. workspace: likewise. planner: makes the
    plans of `forward`'s steps; the group itself if not given. slots, spots: what is in each slot,
    and where its blob is. listeners: called with a slot when what is in it has changed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        arena: Arena | None = None,
        workspace: Workspace | None = None,
        planner: Planner | None = None,
    ) -> None:
        self.group = Group(in_features, tuple(out_features), dtype)
        self.device = device or gpu.default_device()
        self.arena = arena or Arena(self.device)
        widest = max(in_features, *out_features)
        self.arena.have_neutral(PAGE * (widest + -widest % PAGE) * dtype.itemsize, widest + 4)
        self.workspace = workspace or Workspace(self.device)
        self._planner = planner
        self.slots: dict[int, GpuPrepared] = {}
        self.spots: dict[int, Spot] = {}
        self.listeners: list[Callable[[int], None]] = []
        self._residents = Residents((self,))

    def prepare(self, parts: Mapping[int, tuple[Primitive, ...]]) -> GpuPrepared:
        """See `prepared.prepare`."""
        return prepare(parts, self.group)

    def install(self, slot: int, prepared: GpuPrepared) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread. A blob
        that is in the arena already, or was put there for another slot, is not copied again."""
        self.remove(slot)
        if not prepared.parts:
            return
        spot = prepared.home.take(prepared.blob, self.arena)
        self.slots[slot], self.spots[slot] = prepared, spot
        self._changed(slot)

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        if slot not in self.slots:
            return
        self.slots.pop(slot).home.leave(self.spots.pop(slot), self.arena)
        self._changed(slot)

    def _changed(self, slot: int) -> None:
        for tell in self.listeners:
            tell(slot)

    @property
    def nbytes(self) -> int:
        """Exact bytes installed; a blob in several slots is there once."""
        return sum({id(p.home): p.nbytes for p in self.slots.values()}.values())

    def is_native(self, slot: int) -> bool:
        """There is no native code here."""
        return False

    def plan(
        self,
        segments: Segments,
        base: GpuLinear,
        *,
        limits: Limits | None = None,
        config: GemmConfig | None = None,
        aux: AuxConfig | None = None,
        gated: bool = False,
    ) -> StepPlan:
        """The step's tables on the device. limits: room for other steps of as many tokens, whose
        tables `replan` puts at the same addresses. `layers.LayerPlans` plans for many layers at
        once."""
        (alike,) = self._residents.alike(segments)
        draft = self.draft(alike, segments, base, limits, config, aux, gated)
        return step.make([draft], self.device)[0]

    def draft(
        self,
        alike: Alike,
        segments: Segments,
        base: GpuLinear,
        limits: Limits | None = None,
        config: GemmConfig | None = None,
        aux: AuxConfig | None = None,
        gated: bool = False,
    ) -> Draft:
        """A plan for groups like this one, of several layers, without memory."""
        config = config or choose(base.weights, segments.tokens, gated)
        aux = aux or aux_config(segments.tokens, self.group.in_features, gpu.arch(self.device))
        tiling = Tiling(
            tokens=max(config.bm, aux.block, 16),
            block=aux.block,
            rows=aux.rows,
            h_split=aux.h_split,
            depth=aux.bk_bit,
            gathers=aux.gathers,
            programs=RESIDENT * gpu.multiprocessors(self.device),
        )
        tiles = -(-segments.tokens // tiling.tokens)
        tables = self._tables(
            alike, segments, tiles, tiling, limits is not None and limits.uses.apart
        )
        return Draft(tables, segments.tokens, tiles, tiling, aux, len(alike.layers), limits)

    def replan(self, plan: StepPlan, segments: Segments) -> Uses:
        """Fills a plan anew, for at most as many tokens; what the step uses of that plan's `uses`.
        Raises StepTooLarge, and then the plan is as it was."""
        return self.refill(plan, segments, self._residents.alike(segments)[0])

    def refill(self, plan: StepPlan, segments: Segments, alike: Alike) -> Uses:
        """As `replan`, of a plan for several layers."""
        if segments.tokens > plan.tokens:
            raise step.StepTooLarge(
                f"the step has {segments.tokens} tokens; the plan was made for {plan.tokens}"
            )
        apart = plan.limits is not None and plan.uses.apart
        tables = self._tables(alike, segments, plan.tiles, plan.tiling, apart)
        step.fill(plan, tables)
        return tables.uses

    def _tables(
        self, alike: Alike, segments: Segments, tiles: int, tiling: Tiling, apart: bool
    ) -> Tables:
        adapters = Adapters(segments, alike.adapters, len(alike.layers), tiling.tokens)
        return build(self.group, adapters, tiles, tiling, apart)

    def forward(self, x: Tensor, base: GpuLinear, segments: Segments) -> Tensor:
        """x: [T, in]. Returns [T, sum of out_features] of x's dtype.

        Tokens without an adapter get exactly what they get in a step without any.
        """
        if not len(x):
            return base(x)
        return self.run(x, base, self.planned(segments, base))

    def planned(self, segments: Segments, base: GpuLinear, gated: bool = False) -> StepPlan | None:
        """The step's plan, if possible made for all groups of this shape at once; it holds as long
        as `segments` are used. None if no adapter of the step acts on the group. gated: `run` will
        be given an activation."""
        if self._planner is not None:
            return self._planner.plan(self, base, segments, gated)
        if self.slots.keys().isdisjoint(segments.slots):
            return None
        return self.plan(segments, base, gated=gated)

    def wanted(
        self,
        tokens: int,
        base: GpuLinear,
        plan: StepPlan | None,
        *,
        config: GemmConfig | None = None,
        gated: bool = False,
    ) -> Wanted:
        """What `run` wants of its input in such a step, for the kernel that makes it."""
        config = config or choose(base.weights, tokens, gated)
        if plan is not None and (tokens != plan.tokens or plan.tiling.tokens % config.bm):
            raise ValueError(
                f"x has {tokens} tokens and {config} tiles of {config.bm}; the plan was made for "
                f"{plan.tokens} in tiles of {plan.tiling.tokens}"
            )
        return wanted(tokens, base.weights, plan, config, len(self.group.out_features))

    def run(
        self,
        x: Tensor | Inputs,
        base: GpuLinear,
        plan: StepPlan | None,
        *,
        config: GemmConfig | None = None,
        output: Output | None = None,
        sums: Sums | None = None,
    ) -> Tensor:
        """The launches of a planned step: at most one for the inputs, one for what the adapters
        need first, one for routers if the step has any, and the base product, whose epilogue does
        the rest. plan None: no adapters.

        x: [T, in], or all that is wanted of it. config: as given to `plan`. output: an activation,
        a residual, a place for y. sums: of x, if whoever made it took them.
        """
        output = output or Output()
        weights, parts, space = base.weights, self.group.out_features, self.workspace
        tokens = len(x) if isinstance(x, Tensor) else len(x.x)
        gated = output.activation is not None
        config = config or choose(weights, tokens, gated)
        if isinstance(x, Tensor):
            want = self.wanted(tokens, base, plan, config=config)
            inputs = run_inputs(x.contiguous(), want, plan, self.arena, space, sums)
        else:
            inputs = x
        h = planes = space.take("nothing", 1)
        if plan is not None:
            h, planes = run_aux(inputs, plan, self.group, self.arena, space)
            if plan.gates:
                run_gates(h, plan)
        arena = None if plan is None else self.arena
        return run_gemm(inputs, h, planes, weights, parts, plan, config, arena, space, output)
