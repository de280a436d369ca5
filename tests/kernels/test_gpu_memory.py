"""The arena that adapters lie in, and the blobs that are copied there."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deltaserve.kernels.gpu import arena as arena_module
from deltaserve.kernels.gpu.arena import LINE, UNIT, Arena, OutOfArena, Place
from deltaserve.kernels.gpu.blob import BlobWriter
from deltaserve.kernels.gpu.device import default_device

BYTES = 40 * LINE


class ArenaMachine(RuleBasedStateMachine):
    """Blobs come, go, are shared and copied to; the limit changes; every blob keeps its content."""

    @initialize(grows=st.booleans(), bounce=st.sampled_from([8, 1 << 20]))
    def start(self, grows: bool, bounce: int) -> None:
        self.bounce = mock.patch.object(arena_module, "BOUNCE", bounce)
        self.bounce.start()
        self.arena = Arena(default_device(), BYTES, grows)
        self.held: dict[Place, torch.Tensor] = {}
        self.seed = 0

    def teardown(self) -> None:
        if hasattr(self, "bounce"):
            self.bounce.stop()

    @rule(lines=st.integers(1, 12), short=st.integers(0, LINE - 1))
    def put(self, lines: int, short: int) -> None:
        """What fits by bytes is placed, unless a held place is in the way."""
        self.seed += 1
        blob = torch.full((lines * LINE - short,), self.seed % 251, dtype=torch.uint8)
        fits = lines * LINE <= self.arena.units * UNIT - self.arena.used
        stuck = any(place.held for place in self.held)
        try:
            self.held[self.arena.put(blob)] = blob
            assert fits or self.arena.grows
        except OutOfArena:
            assert not self.arena.grows and (stuck or not fits)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(list(self.held)))
        users = place.users
        assert self.arena.drop(place) == (users == 1)
        if users == 1:
            del self.held[place]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(list(self.held))).users += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data(), held=st.booleans())
    def hold(self, data: st.DataObject, held: bool) -> None:
        place = data.draw(st.sampled_from(list(self.held)))
        self.arena.hold(place, held)
        self.starts = {p: p.start for p in self.held if p.held}

    @rule(lines=st.integers(0, 48))
    def limit(self, lines: int) -> None:
        fits = self.arena.used <= lines * LINE
        stuck = any(place.held for place in self.held)
        done = self.arena.limit(lines * LINE)
        assert done <= fits and (done or stuck or not fits)
        if done and not self.arena.grows:
            assert self.arena.units * UNIT == min(lines * LINE, BYTES)

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check_integrity()
        assert self.arena.used == sum(p.units * UNIT for p in self.held)
        for place, blob in self.held.items():
            assert torch.equal(self.arena.bytes_of(place)[: blob.numel()].cpu(), blob)
        for place, start in getattr(self, "starts", {}).items():
            assert not place.held or place not in self.held or place.start == start


ArenaMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
test_blobs_keep_their_content_whatever_comes_and_goes = ArenaMachine.TestCase


def test_an_arena_that_may_not_grow() -> None:
    arena = Arena(default_device(), 1 << 12, grows=False)
    arena.put(torch.zeros(3000, dtype=torch.uint8))
    with pytest.raises(OutOfArena, match="2048 bytes do not fit in an arena of 4096 of which 3072"):
        arena.put(torch.zeros(2000, dtype=torch.uint8))
    arena.put(torch.zeros(1024, dtype=torch.uint8))


@pytest.mark.parametrize("size", [6 * 1024, 9 * 1024, 20 * 1024])
def test_one_that_grew_moves_to_the_end_of_other_memory(size: int) -> None:
    arena = Arena(default_device(), 1 << 10)
    blobs = [torch.full((3000,), i, dtype=torch.uint8) for i in range(3)]
    places = [arena.put(blob) for blob in blobs]
    arena.drop(places[0])
    with pytest.raises(OutOfArena, match="6144 bytes of blobs do not fit in 6016"):
        arena.adopt(torch.full((6 * 1024 - LINE,), 7, dtype=torch.uint8, device=arena.device))
    memory = torch.full((size,), 7, dtype=torch.uint8, device=arena.device)
    arena.adopt(memory)
    arena.check_integrity()
    for place, blob in zip(places[1:], blobs[1:], strict=True):
        assert torch.equal(arena.bytes_of(place)[:3000].cpu(), blob)
        assert torch.equal(memory[place.offset * UNIT :][:3000].cpu(), blob)
    if size > 6 * 1024:
        arena.put(torch.zeros(size - 6 * 1024, dtype=torch.uint8))
    with pytest.raises(OutOfArena):
        arena.put(torch.zeros(1, dtype=torch.uint8))


def test_as_few_bytes_as_can_be_are_moved() -> None:
    """Of two gaps that would do, the one behind the smaller blob is made."""
    arena = Arena(default_device(), 20 * LINE, grows=False)
    sizes = (1, 6, 1, 1, 2, 1, 8)
    places = [arena.put(torch.zeros(n * LINE, dtype=torch.uint8)) for n in sizes]
    for i in (0, 2, 3, 5):
        arena.drop(places[i])
    before = [places[i].start for i in (1, 4, 6)]
    assert arena.reserve(3 * LINE).start == before[0] + 8 * 8
    assert [places[i].start for i in (1, 4, 6)] == [before[0], before[1] - 2 * 8, before[2]]


def test_a_limit_moves_as_few_places_as_can_be() -> None:
    """The gap that is nearest is closed."""
    arena = Arena(default_device(), 20 * LINE, grows=False)
    places = [arena.put(torch.zeros(n * LINE, dtype=torch.uint8)) for n in (2, 6, 2, 3, 2, 5)]
    for i in (0, 2, 4):
        arena.drop(places[i])
    before = [places[i].start for i in (1, 3, 5)]
    assert arena.limit(18 * LINE) and arena.moves == 1
    assert [places[i].start for i in (1, 3, 5)] == [*before[:2], before[2] - 2 * 8]
    arena.hold(places[3], True)
    assert arena.stuck == 13 * LINE
    assert not arena.limit(17 * LINE) and arena.moves == 1 and arena.units == 18 * 8
    assert arena.limit(18 * LINE)


def test_offsets_of_32_bits() -> None:
    with mock.patch.object(arena_module, "MOST", 16):
        assert Arena(default_device(), 40 * LINE, grows=False).units == 16


def test_a_blob_holds_a_tensor_once() -> None:
    writer = BlobWriter()
    a = torch.arange(10, dtype=torch.float32)
    first, second, again = writer.add(a), writer.add(a + 1), writer.add(a)
    assert (first, second, again) == (0, 8, 0)
    blob = writer.bytes()
    assert blob.numel() == 256
    assert torch.equal(blob[128:168].view(torch.float32), a + 1)
    assert BlobWriter().bytes().numel() == 0
