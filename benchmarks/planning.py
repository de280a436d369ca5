"""Milliseconds that a step's adapters cost the processor: the tables of all layers. Needs no GPU.

    python benchmarks/planning.py [--layers 32] [--rows 64] [--repeats 30]

Four groups of linears of the shape of Llama's 8B in every layer, in the last line its norms, two in
every layer and the last one; decoding steps of one token of each of `rows` sequences. Adapters have
the structure that they have at these shapes, over blobs without content: planning reads none. For
each mix of adapters:

- fresh: what a step asks that runs without a graph, for every group of every layer
- filled: a graph's tables filled again; what a GPU then copies by itself is not in it
- unchanged: of the same, for a step of the same adapters in the same places as the one before; the
  other columns are of steps of which each has one adapter that the one before did not have
- moved: filled, after the arena has moved every adapter
- alone: fresh, each layer or norm planned by itself; its ratio to "fresh" is what sharing is worth

Figures are medians of processor time.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from gpu_kernels.shapes import LLAMA_8B
from gpu_kernels.shapes import Group as Shape

from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.blob import Home, Spot
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm_plans import NormPlans, Vectors
from deltaserve.kernels.gpu.norm_tables import NormRoom
from deltaserve.kernels.gpu.prepared import GpuPrepared, Part, Signs
from deltaserve.kernels.gpu.stacks import Stacks
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import Limits
from deltaserve.kernels.gpu.weights import Weights
from deltaserve.kernels.lowrank.pages import Page
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.sparse.panels import Panel
from deltaserve.kernels.sparse.sell import Sell

HOST = torch.device("cpu")
MULTIPROCESSORS = 132
"""Of the GPU that is planned for."""
ROOM = Limits(width=2048, planes=16, items=1 << 15, pages=1 << 13, vectors=1 << 11, entries=1 << 11)
BLOB = torch.zeros(128, dtype=torch.uint8)


def offsets() -> Iterator[int]:
    """Of tensors of any size, each starting a cache line."""
    at = 0
    while True:
        yield at
        at += 8 * random.randint(1, 1000)


def lora(rank: int, shape: Shape, out: int) -> Part:
    def page(p: int) -> Page:
        return Page(p * shape.in_features, (1 << 20) + p * out, 2.0, False)

    return Part(pages=tuple(page(p) for p in range(-(-rank // 8))))


def part(kind: str, shape: Shape, out: int) -> Part:
    """Of one module. The numbers of entries of sparse ones differ between layers, and so do their
    offsets."""
    where = offsets()
    rows = Panel(next(where), next(where), (1,) * (out // 64))
    match kind:
        case "lora":
            return lora(16, shape, out)
        case "bit":
            return Part(signs=(Signs(next(where), next(where), 1),))
        case "sparse":
            return Part(sell=Sell(next(where), next(where), next(where), next(where)))
        case "scale":
            return Part(factors=(0,), input=8 if shape.name == "down" else None)
        case "bias":
            return Part(biases=(0,))
        case "rows":
            return Part(panels=(rows,))
        case "replaced rows":
            return Part(panels=(rows,), factors=(next(where),))
    return lora(int(kind), shape, out)


KINDS = ("lora", "bit", "sparse", "scale", "bias", "rows", "replaced rows")
MIXES = {
    "one LoRA of rank 16": ["one"],
    "distinct LoRA of rank 16": ["lora"],
    "distinct LoRA of ranks 4 to 128": ["4", "8", "16", "32", "64", "128"],
    "distinct, of 7 kinds": list(KINDS),
    "distinct, half LoRA, half of 7 kinds": [k for kind in KINDS for k in ("lora", kind)],
}


class Adapted:
    """Adapters in slots 1, 2, ...; each has one place in the arena, as a delivered one has."""

    def __init__(self) -> None:
        self.arena = Arena(HOST, 64 << 20, grows=False)
        self.gaps: list[Any] = []

    def move(self) -> None:
        """Every adapter down, to where there was a gap; the gaps to its other side."""
        moves = self.arena.moves
        for place in self.gaps:
            self.arena.drop(place)
        self.arena.drop(self.arena.reserve(self.arena.units * 16 - self.arena.used))
        assert self.arena.moves > moves
        self.gaps.clear()


class Norms(Adapted):
    """Adapters that tune every norm."""

    def __init__(self, layers: int, adapters: int) -> None:
        super().__init__()
        self.plans = NormPlans(self.arena)
        self.by_itself = [NormPlans(self.arena) for _ in range(2 * layers + 1)]
        for _ in self.by_itself:
            self.plans.add()
        for slot in range(1, 1 + adapters):
            self.gaps.append(self.arena.reserve(128))
            place = self.arena.reserve(128 * len(self.by_itself))
            for i, alone in enumerate(self.by_itself):
                found = Vectors(Home(), Spot(place, 8 * i), 0, None)
                self.plans.put(i, slot, found)
                if not alone.norms:
                    alone.add()
                alone.put(0, slot, found)

    def fresh(self, segments: Segments) -> None:
        for norm in range(self.plans.norms):
            self.plans.tuned(norm, segments)

    def alone(self, segments: Segments) -> None:
        for plans in self.by_itself:
            plans.plan(segments)

    def reserved(self, rows: int) -> Callable[[Segments], object]:
        room = NormRoom(rows, 2 * rows, self.plans.norms)
        plan = self.plans.reserve(rows, 2 * rows, StaticMemory(room.count, HOST))
        return lambda segments: self.plans.replan(plan, segments)


class Model(Adapted):
    def __init__(self, layers: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self.stacks = Stacks()
        self.bases: list[Any] = []
        self.groups: list[list[GpuLinearDeltas]] = []
        for shape in LLAMA_8B:
            made = [
                GpuLinearDeltas(
                    shape.in_features, shape.parts, torch.bfloat16, device=HOST,
                    arena=self.arena, planner=self.stacks,
                )
                for _ in range(layers)
            ]  # fmt: skip
            for deltas in made:
                self.stacks.add(deltas)
            self.groups.append(made)
            none = torch.zeros(1)
            sizes = (shape.in_features, shape.out_features, 128)
            weights = Weights("int4", *sizes, torch.bfloat16, none, none, none, None)
            self.bases.append(SimpleNamespace(weights=weights))
        self.plans = [LayerPlans(made) for made in self.groups]
        for slot, kind in enumerate(kinds, 1):
            self.gaps.append(self.arena.reserve(128))
            place = self.arena.reserve(128 * layers * len(LLAMA_8B))
            for g, shape in enumerate(LLAMA_8B):
                for i, deltas in enumerate(self.groups[g]):
                    parts = {p: part(kind, shape, out) for p, out in enumerate(shape.parts)}
                    prepared = GpuPrepared(BLOB, parts)
                    prepared.home.spot = Spot(place, 8 * (layers * g + i))
                    deltas.install(slot, prepared)

    def fresh(self, segments: Segments) -> None:
        """What the layers ask of a step, one after the other."""
        for layer in zip(*self.groups, strict=True):
            for deltas, base, shape in zip(layer, self.bases, LLAMA_8B, strict=True):
                deltas.planned(segments, base, shape.name == "gate_up")

    def alone(self, segments: Segments) -> None:
        for made, base, shape in zip(self.groups, self.bases, LLAMA_8B, strict=True):
            for deltas in made:
                deltas.plan(segments, base, gated=shape.name == "gate_up")

    def reserved(self, rows: int) -> Callable[[Segments], None]:
        """Fills plans that were made once."""
        memory = StaticMemory(1 << 24, HOST)
        made = [
            plans.reserve(rows, base, ROOM, gated=shape.name == "gate_up", memory=memory)
            for plans, base, shape in zip(self.plans, self.bases, LLAMA_8B, strict=True)
        ]

        def fill(segments: Segments) -> None:
            for plans, plan in zip(self.plans, made, strict=True):
                plans.replan(plan, segments)

        return fill


def steps(rows: int, repeats: int, one: bool, change: bool) -> list[Segments]:
    """Of `rows` sequences; with `change` the first ends and another comes last."""
    found = []
    for n in range(repeats):
        first = n if change else 0
        slots = [1 if one else 1 + first + i for i in range(rows)]
        # Twice as many adapters as rows: who left comes back when all have had their turn.
        mixes = [((1 + (slot - 1) % (1 if one else 2 * rows), 1.0),) for slot in slots]
        if one and first % 2:
            mixes[-1] = ()  # the only change there can be
        found.append(Segments.of(mixes))
    return found


def measure(call: Callable[[Segments], object], own: Sequence[Segments]) -> float:
    """Median milliseconds of a step; the first, which comes after another kind, not counted."""
    times = []
    for segments in own:
        start = time.thread_time()
        call(segments)
        times.append(1000 * (time.thread_time() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    own = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(1)
    device.multiprocessors = lambda _: MULTIPROCESSORS
    heads = ("fresh", "unchanged", "filled", "unchanged", "moved", "alone", "alone / fresh")
    print(f"milliseconds a step, {own.layers} layers, {own.rows} rows")
    print(f"{'':38}" + "".join(f"{head:>14}" for head in heads))
    for name, kinds in MIXES.items():
        one = kinds == ["one"]
        count = 1 if one else 2 * own.rows
        adapters = ["lora"] if one else [kinds[i % len(kinds)] for i in range(count)]
        show(name, Model(own.layers, adapters), own, one)
    show("distinct, of all norms", Norms(own.layers, 2 * own.rows), own, False)


def show(name: str, model: Model | Norms, own: argparse.Namespace, one: bool) -> None:
    fill = model.reserved(own.rows)

    def times(call: Callable[[Segments], object], change: bool) -> float:
        return measure(call, steps(own.rows, own.repeats, one, change))

    found = [times(model.fresh, True), times(model.fresh, False)]
    found += [times(fill, True), times(fill, False)]
    alone = measure(model.alone, steps(own.rows, 4, one, True))
    (last,) = steps(own.rows, 1, one, False)
    model.move()
    start = time.thread_time()
    fill(last)
    found += [1000 * (time.thread_time() - start), alone, alone / found[0]]
    print(f"{name:38}" + "".join(f"{ms:14.2f}" for ms in found), flush=True)


if __name__ == "__main__":
    main()
