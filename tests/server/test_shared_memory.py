"""One allocation for cache blocks and adapters: whatever comes and goes keeps its content, and
nothing is refused that fits by bytes once what is idle has gone."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deltaserve.kernels.gpu.arena import LINE, Arena, OutOfArena, Place
from deltaserve.kernels.gpu.blob import Home, Spot
from deltaserve.kernels.gpu.shared import SharedMemory
from deltaserve.server.engine.block_pool import BlockPool
from deltaserve.server.engine.kv_cache import BlockManager, OutOfBlocks, block_hash, chain_root
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.residents import Residents
from deltaserve.server.model.probe import LayerAttention

SIZE, LONGEST = 4, 5
LAYERS = [
    LayerAttention(i, heads, heads, key, value, None, None, False, 1.0)
    for i, (heads, key, value) in enumerate([(2, 16, 16), (1, 24, 6)])
]
BLOCK = 512 + 512 + 384 + 128  # a key's side after a value's, each of whole cache lines


@dataclass(eq=False)
class Packed:
    """An adapter of one blob."""

    blob: torch.Tensor
    home: Home = field(default_factory=Home)
    prefix: None = None

    @property
    def nbytes(self) -> int:
        return self.blob.numel()

    @property
    def memory(self) -> dict[Any, int]:
        return {id(self): self.nbytes}


class Model:
    """Has the blobs of its slots in an arena."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.slots: dict[int, tuple[Packed, Spot]] = {}

    def install(self, slot: int, prepared: Packed) -> None:
        self.slots[slot] = prepared, prepared.home.take(prepared.blob, self.arena)

    def remove(self, slot: int) -> None:
        prepared, spot = self.slots.pop(slot)
        prepared.home.leave(spot, self.arena)


@dataclass(eq=False)
class Sequence:
    """marks: what is in each of its blocks."""

    blocks: list[int]
    marks: list[float]


class SharedMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(LONGEST + 1, 16), rest=st.integers(0, 3 * LINE))
    def start(self, blocks: int, rest: int) -> None:
        self.budget = blocks * BLOCK + rest
        self.ledger = Ledger(self.budget, kv_floor=(LONGEST + 1) * BLOCK)
        self.arena = Arena(torch.device("cpu"))
        self.shared = SharedMemory(self.budget, self.arena)
        self.address = self.shared.data.data_ptr()
        self.pool = BlockPool(LAYERS, blocks, SIZE, torch.float32, self.ledger, self.shared)
        assert self.pool.memory.extent_bytes == BLOCK
        self.manager = BlockManager(blocks, SIZE, memory=self.pool.memory)
        self.manager.moved = self.renumber
        self.model = Model(self.arena)
        self.residents = Residents(
            self.model, self.ledger, self.evicted.append, threading.RLock(), lambda p: None
        )  # type: ignore[arg-type]
        self.running: list[Sequence] = []
        self.marks: dict[bytes, float] = {}
        self.coming: list[tuple[Residency, Packed, Place]] = []
        self.resident: dict[Residency, Packed] = {}
        self.count = self.moved = 0

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[Residency] = []

    def renumber(self, renamed: dict[int, int]) -> None:
        self.moved += len(renamed)
        for sequence in self.running:
            sequence.blocks = [renamed.get(b, b) for b in sequence.blocks]

    @property
    def stay(self) -> int:
        """Bytes of adapters that cannot go."""
        fixed = [r.nbytes for r in self.resident if r.running or r.pinned]
        return sum(fixed) + sum(p.nbytes for _, p, _ in self.coming)

    # Sequences

    def sides(self, block: int) -> list[torch.Tensor]:
        store = self.pool.store
        return [t[block] for i in range(len(LAYERS)) for t in (store.keys[i], store.values[i])]

    def take(self) -> int | None:
        """A block is to be had as long as adapters that may go are in its place."""
        used, there = self.manager.used, self.manager.there
        most = min(self.manager.blocks, (self.budget - self.stay) // BLOCK) - 1
        try:
            block = self.manager.take()
        except OutOfBlocks:
            assert used >= most or self.coming
            return None
        assert used < most
        assert block < there or not any(bool(t.any()) for t in self.sides(block))
        return block

    def fill(self, block: int, mark: float) -> None:
        for n, side in enumerate(self.sides(block)):
            side.fill_(mark + n / 8)

    @rule(start=st.sampled_from("ab"), length=st.integers(1, LONGEST))
    def begin(self, start: str, length: int) -> None:
        root = chain_root(start)
        tokens = list(range(length * SIZE))
        blocks, hashes = self.manager.match(root, tokens, len(tokens))
        sequence = Sequence(blocks, [self.marks[h] for h in hashes])
        self.running.append(sequence)
        at = hashes[-1] if hashes else root
        for i in range(len(blocks), length):
            block = self.take()
            if block is None:
                break
            at = block_hash(at, tokens[i * SIZE : (i + 1) * SIZE])
            self.count += 1
            self.fill(block, self.count)
            sequence.blocks.append(block)
            sequence.marks.append(self.count)
            if i % 3 != 2:  # what follows is of nobody's prefix
                self.manager.publish(block, at)
                self.marks.setdefault(at, self.count)
                if self.manager._block_of[at] == block:
                    self.marks[at] = self.count
        if not sequence.blocks:
            self.running.remove(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self.running.remove(sequence)
        self.manager.release(sequence.blocks)

    # Adapters

    @rule(lines=st.integers(1, 5 * BLOCK // LINE), comes=st.booleans())
    def load(self, lines: int, comes: bool) -> None:
        """Whatever fits by bytes once what is idle has gone is let in."""
        self.count += 1
        packed = Packed(torch.full((lines * LINE,), self.count % 251, dtype=torch.uint8))
        residency = Residency(str(self.count), "")
        self.residents.begin_step()
        used = (self.manager.used + 1) * BLOCK
        room = min(self.ledger.adapter_room, self.budget - used)
        fits = self.stay + packed.nbytes <= room
        residency.nbytes = packed.nbytes
        assert self.residents.could_fit(residency, greedy=True) == fits
        made = self.residents.make_room(packed, frozenset())  # type: ignore[arg-type]
        for gone in self.evicted:
            del self.resident[gone]
        self.evicted.clear()
        assert made == fits
        if not made:
            return
        try:
            place = self.arena.reserve(packed.nbytes)
        except OutOfArena:
            assert self.coming
            return
        self.arena.hold(place, True)
        self.residents.book(residency, packed)  # type: ignore[arg-type]
        self.coming.append((residency, packed, place))
        if not comes:
            self.land(0, arrived=True, at=-1)

    @precondition(lambda self: self.coming)
    @rule(at=st.integers(0, 9), arrived=st.booleans())
    def lands(self, at: int, arrived: bool) -> None:
        self.land(at, arrived)

    def land(self, _: int, arrived: bool, at: int | None = None) -> None:
        residency, packed, place = self.coming.pop(_ % len(self.coming) if at is None else at)
        self.arena.bytes_of(place).copy_(packed.blob)
        self.arena.hold(place, False)
        if not arrived:
            self.residents.unbook(residency)
            self.arena.drop(place)
            return
        packed.home.spot = Spot(place)
        self.residents.put_in(residency, packed, 1.0, booked=True)  # type: ignore[arg-type]
        self.arena.drop(place)
        self.resident[residency] = packed

    @precondition(lambda self: self.resident)
    @rule(data=st.data(), what=st.sampled_from(["unload", "run", "pin", "use"]))
    def change(self, data: st.DataObject, what: str) -> None:
        residency = data.draw(st.sampled_from(list(self.resident)))
        if what == "run":
            residency.running = 1 - residency.running
            residency.in_flight = residency.running
        elif what == "pin":
            residency.pinned = not residency.pinned
        elif what == "use":
            self.residents.used(residency)
        elif not residency.running:
            assert self.residents.take_out(residency) == residency.nbytes
            del self.resident[residency]
        self.residents.begin_step()

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "manager"):
            return
        assert not self.evicted or self.clear()
        self.manager.check_integrity()
        self.residents.check_integrity()
        assert self.shared.data.data_ptr() == self.address
        assert self.arena.used == self.ledger.adapters
        boundary = self.shared.boundary
        assert boundary == self.ledger.kv
        start = self.shared.data.numel() - self.arena.view(torch.uint8).numel()
        assert all(start + p.offset * 16 >= boundary for p in self.arena._places)
        held = [pair for s in self.running for pair in zip(s.blocks, s.marks, strict=True)]
        kept = [(b, self.marks[h]) for h, b in self.manager._block_of.items()]
        for block, mark in held + kept:
            assert all(bool((t == mark + n / 8).all()) for n, t in enumerate(self.sides(block)))
        assert not any(bool(t.any()) for t in self.sides(0))
        for packed, spot in self.model.slots.values():
            found = self.arena.view(torch.uint8)[spot.offset * 16 :][: packed.nbytes]
            assert torch.equal(found, packed.blob)

    def clear(self) -> bool:
        """Adapters that went for blocks."""
        for gone in self.evicted:
            del self.resident[gone]
        self.evicted.clear()
        return True


SharedMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
test_every_byte_is_the_caches_or_an_adapters = SharedMachine.TestCase
