"""The tables of random steps over random adapters say what a direct enumeration says, whatever was
installed, removed, moved or planned before."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from plan_decoder import check

from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.blob import Spot
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.parts import Part, Signs
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.prepared import GpuPrepared
from deltaserve.kernels.gpu.stacks import Stacks
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import Limits, StepPlan
from deltaserve.kernels.gpu.weights import Weights
from deltaserve.kernels.lowrank.pages import Page
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.sparse.panels import Panel
from deltaserve.kernels.sparse.sell import Sell

HOST = torch.device("cpu")
INNER, OUTS, LAYERS, SLOTS = 4224, (700, 260, 260), 3, 12
ROOM = Limits(1 << 11, 32, 1 << 14, 1 << 11, 1 << 11, 1 << 10, Uses(True, True, True, True))


def at() -> int:
    return 8 * random.randrange(1 << 12)


def random_part(kinds: set[str]) -> Part:
    several = random.randint(1, 2)
    pages = [
        Page(at(), at(), random.choice((0.5, 2.0)), gathers)
        for gathers in (False, True)
        if ("columns" if gathers else "low") in kinds
        for _ in range(random.randint(1, 9))
    ]
    signs = [Signs(at(), at(), random.randint(1, 3)) for _ in range(several)]
    return Part(
        pages=tuple(random.sample(pages, len(pages))),
        signs=tuple(signs) if "bit" in kinds else (),
        sell=Sell(at(), at(), at(), at()) if "csr" in kinds else None,
        panels=tuple(Panel(at(), at(), ()) for _ in range(several)) if "rows" in kinds else (),
        factors=tuple(at() for _ in range(several)) if "output" in kinds else (),
        biases=tuple(at() for _ in range(several)) if "bias" in kinds else (),
        input=at() if "input" in kinds else None,
        replaced=at() if "replace" in kinds else None,
    )


KINDS = ("low", "columns", "bit", "csr", "rows", "output", "bias", "input", "replace")


def random_adapter() -> dict[int, Part]:
    kinds = set(random.sample(KINDS, random.choice((1, 1, 1, 2, 4))))
    parts = [p for p in range(len(OUTS)) if random.random() < 0.8]
    one = random_part(kinds)
    return {p: one if random.random() < 0.5 else random_part(kinds) for p in parts}


def elsewhere(parts: dict[int, Part]) -> dict[int, Part]:
    """The same adapter with everything somewhere else in its blob."""
    by = 8 * random.randrange(100)

    def moved(part: Part) -> Part:
        sell = part.sell
        return Part(
            tuple(Page(p.a + by, at(), p.scale, p.gathers) for p in part.pages),
            tuple(Signs(at(), s.scales + by, s.planes) for s in part.signs),
            sell and Sell(at(), sell.rows + by, at(), at()),
            tuple(Panel(at(), at(), p.tiles) for p in part.panels),
            tuple(at() for _ in part.factors),
            tuple(v + by for v in part.biases),
            None if part.input is None else part.input + by,
            None if part.replaced is None else part.replaced + by,
        )

    return {i: moved(part) for i, part in parts.items()}


class Layers:
    """Adapters that are alike in all layers (but for where things are), or not, or not in all; some
    with one place for all layers."""

    def __init__(self) -> None:
        self.ways = ("alike", "alike", "apart", "some")
        self.arena = Arena(HOST, 1 << 18, grows=False)
        self.layers = [
            GpuLinearDeltas(INNER, OUTS, torch.bfloat16, device=HOST, arena=self.arena)
            for _ in range(LAYERS)
        ]
        self.plans = LayerPlans(self.layers)
        none = torch.zeros(1)
        weights = Weights("int4", INNER, sum(OUTS), 128, torch.bfloat16, none, none, none, None)
        self.base = SimpleNamespace(weights=weights)
        for slot in range(SLOTS):
            self.install(slot)

    def install(self, slot: int) -> None:
        parts, how = random_adapter(), random.choice(self.ways)
        place = self.arena.reserve(LAYERS * 128) if random.random() < 0.5 else None
        for i, deltas in enumerate(self.layers):
            deltas.remove(slot)
            if how == "some" and random.random() < 0.5:
                continue
            own = random_adapter() if how == "apart" else elsewhere(parts)
            prepared = GpuPrepared(torch.zeros(128, dtype=torch.uint8), own)
            if place is not None:
                prepared.home.spot = Spot(place, 8 * i)
            deltas.install(slot, prepared)
            if how == "apart":
                self.mask(i, slot)
        if place is not None:
            self.arena.drop(place)

    def mask(self, layer: int, slot: int) -> None:
        """A part less, over the same blob."""
        deltas = self.layers[layer]
        if slot in deltas.slots:
            own = deltas.slots[slot]
            deltas.install(slot, own.only(set(own.parts) - {random.randrange(len(OUTS))}))

    def remove(self, slot: int) -> None:
        for deltas in self.layers:
            deltas.remove(slot)

    def move(self) -> None:
        """What is behind a gap."""
        place = self.arena.reserve(self.arena.units * 16 - self.arena.used)
        self.arena.drop(place)

    def check(self, segments: Segments) -> None:
        plans = self.plans.plan(segments, self.base)
        for deltas, plan in zip(self.layers, plans, strict=True):
            if plan is None:
                assert segments.slots.isdisjoint(deltas.slots)
            else:
                check(plan, deltas, segments)


def random_segments(tokens: int, slots: int = SLOTS) -> Segments:
    runs, t = [], 0
    while t < tokens:
        end = min(tokens, t + random.choice((1, 1, 1, 2, 5, 40, 150)))
        mix = tuple(
            (slot, random.choice((1.0, 0.3, -2.0)))
            for slot in random.sample(range(slots + 3), random.choice((0, 1, 1, 1, 3)))
        )
        if mix:
            runs.append((t, end, mix))
        t = end
    return Segments(runs, tokens)


@pytest.fixture(params=(1, 2, 3))
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layers:
    random.seed(request.param)
    many = {1: 1, 2: 20, 3: 132}[request.param]  # several tiles an item, or several items a sum
    monkeypatch.setattr(device, "multiprocessors", lambda _: many)
    return Layers()


def test_tables_are_what_they_should_be(layers: Layers) -> None:
    changes: list[Callable[[int], None]] = [
        layers.install,
        layers.remove,
        lambda slot: layers.mask(random.randrange(LAYERS), slot),
        lambda slot: layers.move(),
    ]
    for tokens in (0, 1, 7, 40, 64, 200, 330, 1, 64, 64):
        segments = random_segments(tokens)
        layers.check(segments)
        random.choice(changes)(random.randrange(SLOTS))
        layers.check(Segments(segments.runs, tokens))


def test_a_reserved_plan_holds_each_step_alone(layers: Layers) -> None:
    """Larger and smaller ones by turns."""
    layers.ways = ("alike",)
    for slot in range(SLOTS):
        layers.install(slot)
    plan = layers.plans.reserve(70, layers.base, ROOM)
    for tokens in (70, 0, 3, 64, 64, 12, 70):
        layers.plans.replan(plan, segments := random_segments(tokens))
        for deltas, own in zip(layers.layers, plan.layers, strict=True):
            check(own, deltas, segments)
        random.choice((layers.install, layers.remove, lambda slot: layers.move()))(
            random.randrange(SLOTS)
        )


def test_a_step_is_sent_once_and_kept_for_the_next(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = GpuLinearDeltas(INNER, (512,), torch.bfloat16, device=HOST, arena=layers.arena)
    stacks, groups = Stacks(), [*layers.layers, other]
    for deltas in groups:
        stacks.add(deltas)
        deltas.install(0, GpuPrepared(torch.zeros(128, dtype=torch.uint8), {0: Part(biases=(8,))}))
    layers.remove(5)  # leaves gaps
    sent: list[StaticMemory] = []
    send = StaticMemory.send
    monkeypatch.setattr(StaticMemory, "send", lambda own: (sent.append(own), send(own)))

    def plans(segments: Segments) -> list[StepPlan | None]:
        found = [stacks.plan(deltas, layers.base, segments) for deltas in groups]
        for deltas, plan in zip(groups, found, strict=True):
            assert plan is not None
            check(plan, deltas, segments)
        return found

    runs = [(0, 3, ((0, 1.0),)), (3, 9, ((1, 0.5), (2, 1.0))), (20, 60, ((3, 1.0),))]
    first = plans(Segments(runs, 64))
    assert len(sent) == 2  # what is asked for is not known before
    before = [len(deltas.listeners) for deltas in groups]
    again = plans(Segments(runs, 64))
    assert all(a is b for a, b in zip(first, again, strict=True)) and len(sent) == 2
    changes: list[Callable[[], None]] = [
        lambda: layers.install(2),
        lambda: layers.remove(1),
        lambda: runs.append((60, 61, ((1, 1.0),))),
        layers.move,
    ]
    for count, change in enumerate(changes, 3):
        change()
        again = plans(Segments(runs, 64))
        assert len(sent) == count and not any(a is b for a, b in zip(first, again, strict=True))
        first = again
    assert before == [len(deltas.listeners) for deltas in groups]


def test_an_arena_that_grows_or_is_taken_elsewhere(layers: Layers) -> None:
    """Every offset is another then."""
    runs = [(slot, slot + 1, ((slot, 1.0),)) for slot in range(SLOTS)]
    layers.check(Segments(runs, SLOTS))
    layers.arena.grows = True
    layers.arena.drop(layers.arena.reserve(2 * 16 * layers.arena.units))
    layers.check(Segments(runs, SLOTS))
    layers.arena.adopt(torch.zeros(1 << 19, dtype=torch.uint8))
    layers.check(Segments(runs, SLOTS))
