"""The one place where the benchmarks meet deltaserve's GPU kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from deltaserve.kernels.base.quantize import quantize
from deltaserve.kernels.gpu.base import GpuLinear, make_linear, quantize_fp8
from deltaserve.kernels.gpu.gemm import Output
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.step import Limits, StepPlan
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.segments import Mix, Segments
from gpu_kernels.data import DEVICE, DTYPE, Adapter, Problem, weight
from gpu_kernels.peers.work import Work
from gpu_kernels.shapes import QUANTIZED_GROUP, Batch, Group

NAME = "deltaserve"
FORMS = {
    "int4": ("int4", "float"),
    "16-bit": ("none", "float"),
    "int8": ("int8", "float"),
    "fp8": ("fp8", "float"),
    "w8a8": ("int8", "int8"),
    "w4a8": ("int4", "int8"),
}
"""How the benchmarks name a form of the base -> (weights, activations) as `make_linear` does."""
ROOM = Limits(width=2048, planes=8, items=1 << 14, pages=1 << 13, vectors=1 << 10, entries=1 << 12)
"""Of a captured step: more than any batch here needs."""


@lru_cache(maxsize=16)
def source(group: Group) -> Tensor:
    """The random weights that every form of a group's base is made of."""
    return weight(group)


@lru_cache(maxsize=64)
def linear(group: Group, form: str, dtype: torch.dtype) -> GpuLinear:
    """A base on the device."""
    quantize, activations = FORMS[form]
    return make_linear(
        source(group),
        None,
        dtype=dtype,
        quantize=quantize,
        group_size=QUANTIZED_GROUP,
        device=DEVICE,
        activations=activations,
    )


def read(form: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 x, which the base's product is of: itself, or in 8 bits a token."""
    if FORMS[form][1] == "float":
        return x.double()
    given = x.to(dtype).float()
    scale = given.abs().amax(1, keepdim=True) / 127
    return (given.double() * (1 / scale).double()).round() * scale.double()


@lru_cache(maxsize=64)
def held_weight(group: Group, form: str, dtype: torch.dtype) -> Tensor:
    """float32 [out, in]: what that base must compute with, from the quantized values as they were
    before they were packed."""
    quantized = FORMS[form][0]
    if quantized == "none":
        return source(group).to(dtype).float()
    if quantized == "fp8":
        held = quantize_fp8(source(group))
        values = held["q"].view(torch.float8_e4m3fn)
    else:
        held = quantize(source(group), int(quantized.removeprefix("int")), QUANTIZED_GROUP)
        values = held["q"]
    q, scale = values.float(), held["scale"]
    if quantized != "int4":
        return q * scale[:, None]
    blocks = q.unflatten(1, (-1, QUANTIZED_GROUP))
    spread: Tensor = (blocks - held["zero"][..., None]) * scale[..., None]
    return spread.flatten(1)


def layers(group: Group, adapters: Sequence[Adapter], count: int) -> list[GpuLinearDeltas]:
    """Layers that hold the same adapters in memory of their own, adapter i in slot i + 1, and
    share a workspace, as a model's do."""
    space = Workspace(DEVICE)
    made = [
        GpuLinearDeltas(group.in_features, group.parts, DTYPE, device=DEVICE, workspace=space)
        for _ in range(count)
    ]
    prepared = {id(adapter): made[0].prepare(adapter) for adapter in adapters}
    for one in made:
        for i, adapter in enumerate(adapters):
            one.install(i + 1, prepared[id(adapter)])
    return made


def mixes(batch: Batch) -> list[Mix]:
    """Of a batch whose tokens have one adapter at most, with strength 1."""
    return [() if slot < 0 else ((slot + 1, 1.0),) for slot in batch]


class Held:
    """One problem on one base: what is timed with deltas and without is the same."""

    def __init__(self, problem: Problem, form: str) -> None:
        self.problem, self.form = problem, form
        self.first = linear(problem.group, form, DTYPE)

    def base(self, copies: int) -> Work:
        """The product alone."""
        x = self.problem.x
        calls = [lambda base=base: base(x) for base in self._bases(copies)]
        return Work(calls, lambda: None, self.first.nbytes)

    def deltas(self, copies: int, room: Limits | None = None) -> Work:
        """The product with every adapter's part. Planning is not in it: a step is planned once for
        all its layers. room: of a plan that a captured graph uses for other steps too."""
        problem = self.problem
        segments = Segments.of(mixes(problem.batch))
        made, bases = layers(problem.group, problem.adapters, copies), self._bases(copies)
        plans = [
            one.plan(segments, base, limits=room) for one, base in zip(made, bases, strict=True)
        ]
        calls = [
            lambda one=one, base=base, plan=plan: one.run(problem.x, base, plan)
            for one, base, plan in zip(made, bases, plans, strict=True)
        ]
        return Work(calls, lambda: None, self.first.nbytes + made[0].nbytes)

    def expected(self) -> Tensor:
        return self.expected_base() + self.problem.delta

    def expected_base(self) -> Tensor:
        """float64, of the weights as held."""
        weight = held_weight(self.problem.group, self.form, DTYPE)
        return read(self.form, self.problem.x, DTYPE) @ weight.double().T

    def _bases(self, copies: int) -> list[GpuLinear]:
        return [self.first, *(copy.deepcopy(self.first) for _ in range(copies - 1))]


class Step:
    """A layer whose step is planned once and filled again with other batches, as under a captured
    graph. slots: the adapters, by slot; one that the kernels refuse is in `refused`, with why."""

    def __init__(self, group: Group, form: str, dtype: torch.dtype, most: int) -> None:
        self.group, self.dtype = group, dtype
        self.read = partial(read, form, dtype=dtype)
        self.base, self.weight = linear(group, form, dtype), held_weight(group, form, dtype)
        self.layer = GpuLinearDeltas(group.in_features, group.parts, dtype, device=DEVICE)
        self.x = torch.zeros(most, group.in_features, dtype=dtype, device=DEVICE)
        self.y = torch.zeros(most, group.out_features, dtype=dtype, device=DEVICE)
        self.refused: dict[int, str] = {}

    def install(self, slots: Mapping[int, Adapter]) -> None:
        for slot, adapter in slots.items():
            try:
                self.layer.install(slot, self.layer.prepare(adapter))
            except (ValueError, NotImplementedError) as reason:
                self.refused[slot] = str(reason)

    def once(self, segments: Segments) -> Tensor:
        """The step of x[:tokens] with a plan of its own."""
        self.poison()
        x, y = self.x[: segments.tokens], self.y[: segments.tokens]
        plan = self.layer.plan(segments, self.base)
        return self.layer.run(x, self.base, plan, output=Output(y=y))

    def captured(self, segments: Segments, apart: bool) -> Callable[[Segments], Tensor]:
        """Plans and captures the step of `segments`; gives a function that replays it for others
        of as many tokens. apart: with room for modules whose inputs are scaled each its own way.
        Without a GPU the launches are made anew each time."""
        x, y = self.x[: segments.tokens], self.y[: segments.tokens]
        plan = self.layer.plan(
            segments, self.base, limits=replace(ROOM, uses=replace(ROOM.uses, apart=apart))
        )
        launches = self._capture(plan, x, y)

        def replay(other: Segments) -> Tensor:
            self.layer.replan(plan, other)
            self.poison()
            launches()
            return y

        return replay

    def _capture(self, plan: StepPlan, x: Tensor, y: Tensor) -> Callable[[], object]:
        def run() -> None:
            self.layer.run(x, self.base, plan, output=Output(y=y))

        run()
        if DEVICE.type != "cuda":
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def poison(self) -> None:
        """NaN in y and in everything that one launch writes for another."""
        self.y.fill_(float("nan"))
        self.layer.workspace.poison()
