"""A step planned once for all layers, over one arena whose blobs move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from gpu_rig import TOLERANCE, GpuRig
from kernel_oracle import random_primitive, relative_error
from test_gpu_plan import LIMITS, STEPS

from deltaserve.kernels.gpu.arena import LINE, Arena
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.step import EVERYTHING, StepTooLarge
from deltaserve.kernels.primitives import Primitive, Scale
from deltaserve.kernels.segments import Segments

INNER, OUTS = 128, (70, 64)
KINDS = {1: "low", 2: "bit", 3: "csr", 4: "rows", 5: "output", 6: "input"}
TOKENS = 12
MANY = replace(LIMITS, width=400, planes=24, items=2000, pages=256, vectors=128, entries=256)


MIXED = {
    1: ("low", "bit", "csr"),
    2: ("low", "rows", "cols", "output"),
    3: ("input", "bias", "blocks"),
    4: ("replace", "low"),
    5: ("low", "low", "bit", "bit", "csr", "csr"),
    6: ("input", "csr"),
}
"""Kinds of which a layer has some on some modules."""


def gappy_adapter(slot: int) -> dict[int, tuple[Primitive, ...]]:
    """Each of a slot's kinds on each module or not, of any rank; input vectors alike or not."""

    def own(kind: str, out: int) -> tuple[Primitive, ...]:
        if torch.rand(()) < 0.4:
            return ()
        rank = int(torch.randint(1, 20, ()))
        return (random_primitive(kind, out, INNER, rank),)

    found = {p: sum((own(kind, out) for kind in MIXED[slot]), ()) for p, out in enumerate(OUTS)}
    if torch.rand(()) < 0.5:
        vector = random_primitive("input", 1, INNER)
        found = {
            part: tuple(
                vector if isinstance(p, Scale) and p.output is None else p for p in primitives
            )
            for part, primitives in found.items()
        }
    return found


def random_adapter(slot: int) -> dict[int, tuple[Primitive, ...]]:
    return {p: (random_primitive(KINDS[slot], out, INNER, 3 * slot),) for p, out in enumerate(OUTS)}


def alike(adapter: dict[int, tuple[Primitive, ...]]) -> dict[int, tuple[Primitive, ...]]:
    """Of the same structure, with other numbers."""

    def other(primitive: Primitive) -> Primitive:
        held = {f.name: getattr(primitive, f.name) for f in fields(primitive)}
        shuffled = {
            name: value.flatten()[torch.randperm(value.numel())].view(value.shape)
            for name, value in held.items()
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.uint8)
        }
        return replace(primitive, **shuffled)

    return {part: tuple(map(other, primitives)) for part, primitives in adapter.items()}


class Layers:
    """Layers over one arena full of NaN, with gaps between the blobs."""

    def __init__(self, count: int, nbytes: int = 1 << 20) -> None:
        memory = torch.full((nbytes,), 255, dtype=torch.uint8, device=default_device())
        self.arena = Arena(default_device())
        self.arena.adopt(memory)
        self.rigs = [GpuRig(INNER, OUTS, torch.float32, {}, quantize="int8") for _ in range(count)]
        for rig in self.rigs:
            rig.deltas = GpuLinearDeltas(INNER, OUTS, torch.float32, arena=self.arena)
        self.plans = LayerPlans([rig.deltas for rig in self.rigs])
        self.gaps = []

    def install(
        self,
        slot: int,
        *,
        layers: range | None = None,
        same: bool = False,
        make: Callable[[int], dict[int, tuple[Primitive, ...]]] = random_adapter,
    ) -> None:
        """A random adapter, another for each layer. same: of the same structure."""
        made = make(slot)
        for i in layers if layers is not None else range(len(self.rigs)):
            rig = self.rigs[i]
            rig.adapters[slot] = alike(made) if same else make(slot)
            rig.deltas.install(slot, rig.deltas.prepare(rig.adapters[slot]))
            self.gaps.append(self.arena.put(torch.full((LINE,), 255, dtype=torch.uint8)))

    def close_gaps(self) -> None:
        """Every blob behind the first gap moves."""
        for place in self.gaps:
            self.arena.bytes_of(place).fill_(255)
            self.arena.drop(place)
        self.gaps.clear()
        moves = self.arena.moves
        free = self.arena.units * 16 - self.arena.used
        place = self.arena.reserve(free)
        self.arena.bytes_of(place).fill_(255)
        self.arena.drop(place)
        assert self.arena.moves > moves

    def error(self, plans: list, segments: Segments) -> float:
        """The largest of all layers; NaN if any is."""
        found = []
        for rig, plan in zip(self.rigs, plans, strict=True):
            rig.deltas.workspace.poison()
            x = rig.x(TOKENS)
            y = rig.deltas.run(x, rig.base, plan)
            found.append(relative_error(y.cpu(), torch.cat(rig.parts(x, segments), 1)))
        return float(torch.tensor(found).max())


@pytest.mark.parametrize("same", [True, False], ids=["alike", "apart"])
def test_layers_share_a_plan_and_not_their_blobs(same: bool) -> None:
    own = Layers(3)
    for slot in KINDS:
        own.install(slot, same=same)
    if not same:
        own.install(1, layers=range(1), make=lambda slot: {1: random_adapter(slot)[1]})
        own.install(2, layers=range(2, 3), make=lambda slot: {0: random_adapter(slot)[0]})
    segments = Segments(STEPS["all kinds"], TOKENS)
    plans = own.plans.plan(segments, own.rigs[0].base)
    assert len({p.buffer.data_ptr() for p in plans if p is not None}) == (1 if same else 3)
    shared = 0
    for slot in KINDS:  # what a plan reads of an adapter is one object where it is equal
        parts = [rig.deltas.slots[slot].parts for rig in own.rigs]
        different = len({tuple(p.items()) for p in parts})
        assert len({id(p) for p in parts}) == different
        shared += different == 1
    assert bool(shared) >= same
    assert own.error(plans, segments) < TOLERANCE[torch.float32]
    own.close_gaps()
    plans = own.plans.plan(segments, own.rigs[0].base)
    assert own.error(plans, segments) < TOLERANCE[torch.float32]


def test_layers_that_an_adapter_leaves_out_or_gets_later() -> None:
    own = Layers(4)
    own.install(1, layers=range(1, 3))
    own.install(2, layers=range(2, 4))
    segments = Segments([(0, 3, ((1, 1.0),)), (3, 5, ((2, 0.5), (1, 0.5)))], TOKENS)
    plans = own.plans.plan(segments, own.rigs[0].base)
    assert plans[0] is None and None not in plans[1:]
    assert own.error(plans, segments) < TOLERANCE[torch.float32]
    own.install(1)
    plans = own.plans.plan(segments, own.rigs[0].base)
    assert plans[0] is not None
    assert own.error(plans, segments) < TOLERANCE[torch.float32]


def test_a_reserved_plan_is_filled_for_all_layers() -> None:
    own = Layers(3)
    for slot in KINDS:
        own.install(slot, same=True)
    plan = own.plans.reserve(TOKENS, own.rigs[0].base, LIMITS)
    for name in ("one", "all kinds", "nothing", "every token its own"):
        segments = Segments(STEPS[name], TOKENS)
        own.plans.replan(plan, segments)
        assert own.error(list(plan.layers), segments) < TOLERANCE[torch.float32], name
        if own.gaps:
            own.close_gaps()
    own.install(3)  # other numbers of entries in each layer
    segments = Segments(STEPS["all kinds"], TOKENS)
    own.plans.replan(plan, segments)
    assert own.error(list(plan.layers), segments) < TOLERANCE[torch.float32]
    own.install(1, make=lambda slot: {0: (random_primitive("gated", OUTS[0], INNER, 2),)})
    own.install(1, layers=range(1), same=True)
    before = plan.buffer.clone()
    with pytest.raises(StepTooLarge, match="2 structures"):
        own.plans.replan(plan, segments)
    own.install(1, same=True)
    small = own.plans.reserve(TOKENS, own.rigs[0].base, replace(LIMITS, pages=1))
    with pytest.raises(StepTooLarge, match="page_col has"):
        own.plans.replan(small, Segments(STEPS["one"], TOKENS))
    assert torch.equal(plan.buffer, before)


@pytest.mark.parametrize("seed", range(2))
def test_layers_lack_what_others_have(seed: int) -> None:
    """Other kinds, ranks, scales and modules in each of many layers, and one without any."""
    torch.manual_seed(seed)
    own = Layers(5, 1 << 22)
    for slot in MIXED:
        own.install(slot, layers=range(4), make=gappy_adapter)
    segments = Segments([*STEPS["all kinds"][:-1], (11, 12, ((6, 0.5), (4, 0.75)))], TOKENS)
    reserved = own.plans.reserve(TOKENS, own.rigs[0].base, MANY)
    plans = own.plans.plan(segments, own.rigs[0].base)
    assert len({p.n_items.data_ptr() for p in plans if p is not None}) == 1
    assert own.error(plans, segments) < TOLERANCE[torch.float32]
    own.close_gaps()
    own.plans.replan(reserved, segments)
    for _ in range(2):  # from the second time on over memory of NaN
        assert own.error(list(reserved.layers), segments) < TOLERANCE[torch.float32]


def test_inputs_that_layers_share_and_others_do_not() -> None:
    """A vector for both modules in one layer, for the first alone in another: no graph has room for
    inputs apart."""
    own = Layers(2)
    vector = random_primitive("input", 1, INNER)
    own.install(6, layers=range(1), make=lambda slot: {0: (vector,), 1: (vector,)})
    own.install(6, layers=range(1, 2), make=lambda slot: {0: (vector,)})
    segments = Segments([(2, 5, ((6, 1.0),))], TOKENS)
    together = own.plans.reserve(TOKENS, own.rigs[0].base, replace(MANY, uses=EVERYTHING))
    with pytest.raises(StepTooLarge, match="apart"):
        own.plans.replan(together, segments)
    apart = own.plans.reserve(TOKENS, own.rigs[0].base, MANY)
    own.plans.replan(apart, segments)
    assert own.error(list(apart.layers), segments) < TOLERANCE[torch.float32]
    own.install(6, make=lambda slot: {0: (vector,), 1: (vector,)})
    own.plans.replan(together, segments)
    assert own.error(list(together.layers), segments) < TOLERANCE[torch.float32]


def test_a_blob_in_several_slots_is_there_once() -> None:
    own = Layers(1)
    deltas, made = own.rigs[0].deltas, random_adapter(1)
    prepared = deltas.prepare(made)
    deltas.install(1, prepared)
    used = own.arena.used
    deltas.install(2, prepared.only({1}))
    assert own.arena.used == used and deltas.nbytes == prepared.nbytes
    own.rigs[0].adapters = {1: made, 2: {1: made[1]}}
    segments = Segments([(0, 3, ((2, 1.0),)), (3, 5, ((1, 0.5),))], TOKENS)
    assert own.error([deltas.plan(segments, own.rigs[0].base)], segments) < 2e-6
    deltas.remove(1)
    assert own.arena.used == used
    deltas.remove(2)
    assert own.arena.used == 0 and prepared.home.spot is None


def test_layers_of_other_shapes_or_arenas_are_refused() -> None:
    a = GpuLinearDeltas(INNER, OUTS, torch.float32)
    for other in (
        GpuLinearDeltas(INNER, OUTS, torch.float32),
        GpuLinearDeltas(INNER, (64,), torch.float32, arena=a.arena),
    ):
        with pytest.raises(ValueError, match="one shape and over one arena"):
            LayerPlans([a, other])
