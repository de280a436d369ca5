"""Copy, event, publication; and memory is written again only after the last step that reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_double import DelayedStreams
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kernel_oracle import random_primitive

from deltaserve.kernels.gpu.arena import LINE, UNIT, Arena, OutOfArena
from deltaserve.kernels.gpu.delivery import Delivery, DeviceCourier
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.prepared import GpuPrepared, Part
from deltaserve.kernels.gpu.staging import Staging, Submit, now
from deltaserve.kernels.gpu.streams import HostStreams, streams

SLICES, SIZE = 3, 2 * LINE


def blob(number: int, lines: int) -> GpuPrepared:
    """Its structure does not matter here."""
    return GpuPrepared(torch.full((lines * LINE,), number, dtype=torch.uint8), {0: Part()})


def content(prepared: GpuPrepared, arena: Arena) -> torch.Tensor:
    assert prepared.home.spot is not None
    start = prepared.home.spot.offset * UNIT
    return arena.view(torch.uint8)[start : start + prepared.nbytes].clone()


class SteppedArena(Arena):
    """Moves blobs on the stream of the steps, as one on a device does."""

    streams: DelayedStreams

    def _copy(self, source: int, offset: int, units: int) -> None:
        copy = super()._copy
        self.streams.launch(lambda: copy(source, offset, units))


class Thread:
    """What fills the ring, when it is told to."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()

    def submit(self, job: Callable[[], None]) -> Future[None]:
        self._jobs.append((job, Future()))
        return self._jobs[-1][1]

    def work(self) -> None:
        while self._jobs:
            job, done = self._jobs.popleft()
            job()
            done.set_result(None)


class Rig:
    def __init__(self, lines: int = 64, submit: Submit = now) -> None:
        self.streams = DelayedStreams()
        self.staging = Staging(self.streams, slices=SLICES, nbytes=SIZE, submit=submit)
        self.arena = SteppedArena(default_device(), lines * LINE, grows=False)
        self.arena.streams = self.streams

    def deliver(self, *prepared: GpuPrepared) -> Delivery:
        return Delivery(prepared, self.arena, self.staging)


def test_slices_are_bounded_and_the_ring_is_never_waited_for() -> None:
    own = Rig()
    one, two = blob(7, 9), blob(9, 4)
    delivery = own.deliver(one, two)
    assert own.streams.copies == [] and not delivery.arrived
    assert own.staging.pump(2)  # two slices, as it was told
    assert len(own.streams.copies) == 4  # each with its event
    assert own.staging.pump(9)
    assert len(own.streams.copies) == 2 * SLICES  # the ring is full, and it returns
    own.streams.advance_copies(2)
    assert own.staging.pump(9) and len(own.streams.copies) == 2 * SLICES
    while own.staging.pump(9):
        assert not delivery.arrived
        own.streams.advance_copies(2)
    assert not delivery.arrived  # launched is not arrived
    own.streams.advance_copies()
    assert delivery.arrived and one.home.spot is None  # nor arrived published
    delivery.publish()
    for prepared in (one, two):
        assert torch.equal(content(prepared, own.arena), prepared.blob)
    delivery.finish()
    assert own.arena.used == 0 and one.home.spot is None  # nobody had installed it


def test_the_ring_is_filled_beside_the_steps_a_slice_of_several_blobs_at_a_time() -> None:
    thread = Thread()
    own = Rig(submit=thread.submit)
    blobs = [blob(n, 1 + n % 2) for n in range(1, 6)]  # 8 lines, 4 slices
    delivery = own.deliver(*blobs)
    for left in (3, 2, 1, 0):
        assert own.staging.pump(9) and own.staging.full
        assert own.streams.copies == []  # it is not in the ring yet
        thread.work()
        assert own.staging.pump(1) == (left > 0) and not own.staging.full
        assert len(own.streams.copies) == 2  # with its event
        own.streams.advance_copies()
    assert delivery.arrived
    delivery.publish()
    for prepared in blobs:
        assert torch.equal(content(prepared, own.arena), prepared.blob)


def test_a_slice_that_is_being_filled_when_it_is_cancelled_comes_back() -> None:
    thread = Thread()
    own = Rig(submit=thread.submit)
    for _ in range(2 * SLICES):
        delivery = own.deliver(blob(1, 2))
        assert own.staging.pump() and own.staging.full
        delivery.cancel()
        assert delivery.arrived and not own.staging.pump()
        delivery.finish()
        thread.work()
    assert own.streams.copies == []
    own.deliver(blob(1, 2))
    thread.work()
    assert not own.staging.pump() and len(own.streams.copies) == 2


def test_what_could_not_be_filled_is_not_launched() -> None:
    failed: Future[None] = Future()
    failed.set_exception(MemoryError("no more"))
    own = Rig(submit=lambda job: failed)
    own.deliver(blob(1, 2))
    with pytest.raises(MemoryError, match="no more"):
        own.staging.pump()
    assert own.streams.copies == []


def test_what_is_pinned_is_copied_without_the_ring() -> None:
    own = Rig()
    prepared = blob(3, 12)
    with mock.patch.object(torch.Tensor, "is_pinned", lambda self: True):
        delivery = own.deliver(prepared)
        assert not own.staging.pump(9)
    assert len(own.streams.copies) == 12  # more slices than the ring has
    own.streams.advance_copies()
    delivery.publish()
    assert torch.equal(content(prepared, own.arena), prepared.blob)


def test_a_copy_comes_after_the_steps_that_read_what_was_there() -> None:
    own = Rig(8)
    seen = []
    first = blob(1, 8)
    delivery = own.deliver(first)
    while own.staging.pump():
        own.streams.advance_copies()
    own.streams.advance_copies()
    delivery.publish()
    own.streams.launch(lambda: seen.append(own.arena.view(torch.uint8)[: 8 * LINE].clone()))
    delivery.finish()  # evicted between two steps, the launched one not having happened yet
    second = blob(2, 8)
    delivery = own.deliver(second)
    for _ in range(9):
        own.staging.pump(9)
        own.streams.advance_copies()
    assert not delivery.arrived
    own.streams.advance_steps()
    assert (seen[0] == 1).all()
    while not delivery.arrived:
        own.staging.pump(9)
        own.streams.advance_copies()
    delivery.publish()
    assert torch.equal(content(second, own.arena), second.blob)


def test_a_cancelled_one_keeps_its_place_until_its_copies_are_done() -> None:
    own = Rig(16)
    keeps = own.arena.put(torch.zeros(4 * LINE, dtype=torch.uint8))
    delivery = own.deliver(blob(5, 8))
    own.staging.pump(1)
    delivery.cancel()
    assert not delivery.arrived
    own.arena.drop(keeps)
    with pytest.raises(OutOfArena, match="others are being copied"):
        own.arena.reserve(8 * LINE)
    assert not own.staging.pump(9) and len(own.streams.copies) == 2
    own.streams.advance_copies()
    assert delivery.arrived
    delivery.finish()
    own.arena.reserve(16 * LINE)


def test_an_adapter_of_two_groups_shares_a_place_until_both_let_go() -> None:
    own = Rig(200)
    groups = [GpuLinearDeltas(64, (40,), torch.float32, arena=own.arena) for _ in range(2)]
    prepared = [g.prepare({0: (random_primitive("low", 40, 64),)}) for g in groups]
    delivery = own.deliver(*prepared)
    while own.staging.pump(9):
        own.streams.advance_copies()
    own.streams.advance_copies()
    delivery.publish()
    for group, p in zip(groups, prepared, strict=True):
        group.install(1, p)
    groups[0].install(7, prepared[0].only({0}))
    delivery.finish()
    used = own.arena.used
    assert used == sum(p.nbytes for p in prepared)
    groups[0].remove(1)
    groups[1].remove(1)
    assert own.arena.used == used and prepared[1].home.spot is None
    groups[0].remove(7)
    assert own.arena.used == 0 and prepared[0].home.spot is None


class StagingMachine(RuleBasedStateMachine):
    """Adapters come, are cancelled, serve, go; the arena is small, so that places are used again
    and blobs move. Every step reads what its adapters' content is."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = Thread()
        self.own = Rig(24, self.thread.submit)
        self.number = 0
        self.coming: list[tuple[GpuPrepared, Delivery]] = []
        self.there: list[tuple[GpuPrepared, Delivery]] = []
        self.leaving: list[Delivery] = []
        self.wrong: list[int] = []

    @rule(lines=st.integers(1, 12))
    def deliver(self, lines: int) -> None:
        self.number = self.number % 250 + 1
        prepared = blob(self.number, lines)
        try:
            self.coming.append((prepared, self.own.deliver(prepared)))
        except OutOfArena:
            free = self.own.arena.units * UNIT - self.own.arena.used
            assert lines * LINE > free or self.coming or self.leaving

    @rule(slices=st.integers(1, 4))
    def pump(self, slices: int) -> None:
        self.own.staging.pump(slices)
        for pair in [p for p in self.coming if p[1].arrived]:
            self.coming.remove(pair)
            pair[1].publish()
            self.there.append(pair)
        for delivery in [d for d in self.leaving if d.arrived]:
            self.leaving.remove(delivery)
            delivery.finish()

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.coming))
        self.coming.remove(pair)
        pair[1].cancel()
        self.leaving.append(pair[1])

    @precondition(lambda self: self.there)
    @rule()
    def step(self) -> None:
        """Reads where the blobs are as it is launched, as a plan's tables say."""
        memory = self.own.arena.view(torch.uint8)
        reads = []
        for prepared, _ in self.there:
            assert prepared.home.spot is not None
            start = prepared.home.spot.offset * UNIT
            reads.append((memory[start : start + prepared.nbytes], int(prepared.blob[0])))
        self.own.streams.launch(
            lambda: self.wrong.extend(n for piece, n in reads if not (piece == n).all())
        )

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.there))
        self.there.remove(pair)
        pair[1].finish()

    @rule()
    def the_ring_is_filled(self) -> None:
        self.thread.work()

    @rule(count=st.integers(1, 4))
    def copies_happen(self, count: int) -> None:
        self.own.streams.advance_copies(count)

    @rule(count=st.integers(1, 3))
    def steps_happen(self, count: int) -> None:
        self.own.streams.advance_steps(count)

    @invariant()
    def right(self) -> None:
        assert not self.wrong
        self.own.arena.check_integrity()

    def teardown(self) -> None:
        self.own.streams.advance_steps()
        assert not self.wrong


StagingMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, derandomize=True
)
test_every_step_reads_its_adapters = StagingMachine.TestCase


def adapter(linear: int, **others: Any) -> Any:
    """One of a linear of so many units, and of what else is given."""
    nothing: dict[str, Any] = {"norms": {}, "embedding": None, "gated": None}
    return SimpleNamespace(linears={"a": blob(1, linear)}, **{**nothing, **others})


def test_the_courier_says_when_there_is_no_place() -> None:
    own = Rig(8)
    courier = DeviceCourier(own.arena, own.staging)
    first = courier.send(adapter(3, norms={"b": blob(2, 3)}))
    second = adapter(3)
    assert first is not None and courier.send(second) is None
    while not first.arrived:
        courier.pump()
        own.streams.advance_copies()
    first.publish()
    first.finish()
    assert courier.send(second) is not None
    nothing = courier.send(adapter(0))
    assert nothing is not None and nothing.arrived
    nothing.publish()
    used = own.arena.used
    nothing.finish()
    assert own.arena.used == used


def test_the_courier_brings_all_of_an_adapter() -> None:
    own = Rig(16)
    everything = [blob(i, 2) for i in range(2, 5)]
    norm, embedding, gated = everything
    sent = adapter(2, norms={"b": norm}, embedding=embedding, gated=gated)
    everything.append(sent.linears["a"])
    courier = DeviceCourier(own.arena, own.staging)
    parcel = courier.send(sent)
    assert parcel is not None
    while not parcel.arrived:
        courier.pump()
        own.streams.advance_copies()
    parcel.publish()
    data = own.arena.view(torch.uint8)
    for one in everything:
        assert one.home.spot is not None
        start = one.home.spot.offset * 16
        assert torch.equal(data[start : start + one.nbytes], one.blob)
    parcel.finish()


def test_the_interpreter_has_streams_too() -> None:
    found = streams(torch.device("cpu"))
    assert isinstance(found, HostStreams) and found.record().done()
    target = torch.zeros(4, dtype=torch.uint8)
    found.copy(target, found.pinned(4).fill_(3))
    assert target.tolist() == [3, 3, 3, 3]
