"""One budget for blocks and adapters: never exceeded, nothing lost, the least valuable goes."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltaserve.server.engine.kv_cache import BlockManager, OutOfBlocks, chain_root
from deltaserve.server.engine.kv_memory import BlockMemory
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.residents import PATIENCE, Residents
from deltaserve.server.engine.shares import Shares
from deltaserve.server.errors import AdapterTooLarge, InvalidRequest


@dataclass
class Packed:
    memory: Mapping[Any, int]
    prefix: None = None

    @property
    def nbytes(self) -> int:
        return sum(self.memory.values())


class Host:
    def __init__(self) -> None:
        self.slots: dict[int, Any] = {}

    def prepare(self, adapter: Any) -> Any:
        raise NotImplementedError

    def only(self, prepared: Any, modules: object) -> Any:
        return prepared

    def install(self, slot: int, prepared: Any) -> None:
        assert slot not in self.slots
        self.slots[slot] = prepared

    def remove(self, slot: int) -> None:
        del self.slots[slot]


@dataclass
class Tier:
    """Blocks of two tokens in extents of `extent`, ten bytes a block, and adapters."""

    budget: int
    blocks: int = 40
    extent: int = 2
    kv_floor: int = 40
    cap: int | None = None
    dropped: list[int] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.budget, kv_floor=self.kv_floor, adapter_cap=self.cap)
        memory = BlockMemory(self.ledger, self.extent, 10 * self.extent, self.dropped.append, 0.5)
        self.manager = BlockManager(self.blocks, 2, memory=memory)
        self.host = Host()
        self.residents = Residents(
            self.host,
            self.ledger,
            lambda r: self.evicted.append(r.name),
            threading.RLock(),
            lambda prepared: None,
        )

    def load(self, name: str, memory: Mapping[Any, int] | int, seconds: float = 1.0) -> Residency:
        """Raises AdapterTooLarge, or AssertionError if there is no room now."""
        packed = Packed({name: memory} if isinstance(memory, int) else memory)
        residency = Residency(name, f"/{name}")
        self.residents.check_room((), name, packed.memory)
        assert self.residents.make_room(packed, frozenset()), "no room"
        self.residents.put_in(residency, packed, seconds)
        return residency

    def cached(self, blocks: int, name: str) -> list[int]:
        """A sequence of full blocks came and went."""
        taken = [self.manager.take() for _ in range(blocks)]
        for i, block in enumerate(taken):
            self.manager.publish(block, chain_root(name, str(i)))
        self.manager.release(taken)
        return taken

    def check(self) -> None:
        self.manager.check_integrity()
        self.residents.check_integrity()
        assert self.ledger.kv + self.residents.used_bytes <= self.budget


def test_blocks_grow_where_no_adapter_is_and_shrink_when_one_comes() -> None:
    tier = Tier(100)
    assert (tier.ledger.kv, tier.manager.available) == (20, 9)
    blocks = [tier.manager.take() for _ in range(9)]
    assert tier.ledger.kv == 100
    with pytest.raises(OutOfBlocks):
        tier.manager.take()
    tier.manager.release(blocks)
    tier.load("a", 60)
    assert tier.ledger.kv == 40 and sorted(tier.dropped) == [2, 3, 4]
    assert tier.manager.available == 9, "at the cost of the adapter, which nobody uses"
    tier.check()


def test_the_lowest_blocks_are_taken_so_that_extents_become_empty() -> None:
    tier = Tier(400)
    long, short = ([tier.manager.take() for _ in range(n)] for n in (9, 2))
    tier.manager.release(long)
    assert [tier.manager.take() for _ in range(3)] == sorted(long)[:3]
    tier.manager.release(short)


def test_running_sequences_outbid_idle_adapters_and_no_others() -> None:
    tier = Tier(100)
    pinned, idle = tier.load("pinned", 30), tier.load("idle", 20)
    pinned.pinned = True
    [tier.manager.take() for _ in range(5)]
    assert tier.evicted == ["idle"] and not idle.ready
    with pytest.raises(OutOfBlocks):
        tier.manager.take()
    assert tier.evicted == ["idle"]
    tier.check()


def test_an_adapter_that_a_request_waits_for_does_not_go_for_blocks() -> None:
    tier = Tier(100)
    wanted = tier.load("wanted", 50)
    wanted.in_flight = 1
    tier.residents.begin_step()
    assert tier.manager.available == 3
    with pytest.raises(OutOfBlocks):
        [tier.manager.take() for _ in range(4)]
    assert wanted.ready


@pytest.mark.parametrize(("seconds", "gone"), [(0.1, ["a"]), (1000.0, [])])
def test_the_cheaper_to_get_back_goes(seconds: float, gone: list[str]) -> None:
    """A cached block of ten bytes takes a second, the adapter of 60 bytes `seconds`."""
    tier = Tier(100, kv_floor=20)
    tier.load("a", 60, seconds)
    tier.cached(3, "prompt")
    tier.manager.take()
    assert tier.evicted == gone
    assert tier.manager.idle == (3 if gone else 2)
    tier.check()


def test_adapters_go_by_load_seconds_a_byte_and_uses() -> None:
    tier = Tier(140)
    tier.load("dear", 30, 4.0)
    tier.load("cheap", 30, 1.0)
    popular = tier.load("popular", 30, 1.0)
    for _ in range(5):
        tier.residents.used(popular)
    for name in ("x", "y"):
        tier.load(name, 30, 2.0)
    assert tier.evicted == ["cheap", "x"]


def test_what_is_not_used_any_more_sinks() -> None:
    """The clock rises with every eviction, so a once popular one does not stay for ever."""
    tier = Tier(80)
    popular = tier.load("popular", 20, 1.0)
    for _ in range(6):
        tier.residents.used(popular)
    for i in range(20):
        tier.load(f"a{i}", 20, 1.0)
    assert 0 < tier.evicted.index("popular") < 10


def test_an_adapter_that_waited_long_gets_room_from_running_sequences() -> None:
    tier = Tier(100)
    blocks = [tier.manager.take() for _ in range(9)]
    packed, late = Packed({"a": 50}), Residency("a", "/a", nbytes=50)
    assert not tier.residents.make_room(packed, frozenset())
    late.crowded = True
    tier.residents.promise([late])
    assert tier.ledger.promised == 0, "not yet"
    late.crowded_since -= PATIENCE + 1
    tier.residents.promise([late])
    assert tier.manager.available == 0
    tier.manager.release(blocks[3:])
    assert tier.manager.available == 0, "what becomes free is the adapter's"
    assert tier.residents.make_room(packed, frozenset())
    tier.residents.put_in(late, packed, 1.0)
    late.crowded = False
    tier.residents.promise([])
    tier.check()


def test_what_is_promised_leaves_the_longest_sequence_its_room() -> None:
    tier = Tier(100, kv_floor=60)
    late = Residency("a", "/a", nbytes=40)
    late.crowded_since = 1e-9
    tier.residents.promise([late])
    blocks = [tier.manager.take() for _ in range(5)]
    with pytest.raises(OutOfBlocks):
        tier.manager.take()
    tier.manager.release(blocks)


def test_adapters_never_take_the_room_of_the_longest_sequence() -> None:
    tier = Tier(100, kv_floor=60)
    with pytest.raises(AdapterTooLarge, match=r"41 bytes, the adapter memory is 40 bytes"):
        tier.load("a", 41)
    held = tier.load("a", 40)
    held.running = 1
    [tier.manager.take() for _ in range(5)]
    tier.check()


def test_a_combination_is_sure_of_its_blocks_before_it_begins() -> None:
    """It needs more than the longest sequence, and requests wait for adapters in its way."""
    tier = Tier(200, kv_floor=40)
    ours, theirs = tier.load("ours", 50), tier.load("theirs", 80)
    ours.in_flight = theirs.in_flight = ours.running = 1
    tier.residents.begin_step()
    assert tier.manager.available == 5
    assert not tier.manager.claim(15), "160 bytes beside the adapter that runs are too many"
    assert tier.manager.claim(13) and tier.evicted == ["theirs"]
    assert not tier.residents.make_room(Packed({"b": 30}), frozenset())
    assert len([tier.manager.take() for _ in range(13)]) == 13
    tier.check()
    tier.manager.keep_claim(5)
    assert tier.ledger.claimed == 60
    with pytest.raises(InvalidRequest, match=r"1 adapters and .* 50 bytes, and 160 bytes of keys"):
        tier.residents.check_beside([ours], 160)


def test_shared_memory_is_counted_once() -> None:
    tier = Tier(140)
    a, b = (tier.load(n, {"matrices": 70, n: 10}) for n in "ab")
    assert tier.residents.used_bytes == 90 and (a.nbytes, b.nbytes) == (80, 80)
    assert tier.residents.take_out(a) == 10
    assert tier.residents.used_bytes == 80
    assert tier.residents.could_fit(a, greedy=False), "it would add ten bytes"
    tier.residents.check_room([a, b], "a and b need")
    b.running = 1
    with pytest.raises(AssertionError, match="no room"):
        tier.load("c", {"others": 60})
    assert tier.residents.take_out(b) == 80 and tier.residents.used_bytes == 0
    tier.check()


def test_evicting_sharers_until_their_common_memory_is_free() -> None:
    tier = Tier(140)
    for name in "abc":
        tier.load(name, {"matrices": 60, name: 10})
    tier.load("d", {"others": 90})
    assert sorted(tier.evicted) == ["a", "b", "c"] and tier.residents.used_bytes == 90


pieces = st.dictionaries(st.sampled_from("uvwxyz"), st.just(0), min_size=1, max_size=4)
SIZES = {"u": 3, "v": 5, "w": 11, "x": 17, "y": 29, "z": 41}


class Budgeted(RuleBasedStateMachine):
    """Sequences take, publish and release blocks, adapters come, are pinned, run and go."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = Tier(230, blocks=30, extent=3, kv_floor=60, cap=150)
        self.sequences: list[list[int]] = []
        self.adapters: dict[str, Residency] = {}
        self.loads = 0

    @property
    def there(self) -> list[Residency]:
        return [r for r in self.adapters.values() if r.ready]

    @rule(blocks=st.integers(1, 12), prompt=st.sampled_from("pqrs"))
    def sequence(self, blocks: int, prompt: str) -> None:
        manager, tokens = self.tier.manager, [ord(prompt)] * 2 * blocks
        taken, hashes = manager.match(chain_root(prompt), tokens, len(tokens) - 1)
        missing = blocks - len(taken)
        promised = manager.available
        try:
            new = []
            for _ in range(missing):
                new.append(manager.take())
                taken.append(new[-1])
        except OutOfBlocks:
            assert promised < missing, "what was available could not be taken"
            assert manager.available == 0
        else:
            assert promised >= missing
        for i in range(len(hashes), len(taken)):
            manager.publish(taken[i], chain_root(prompt, str(i)))
        self.sequences.append(taken)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        self.tier.manager.release(self.sequences.pop(which % len(self.sequences)))

    @rule(parts=pieces, own=st.integers(1, 100), seconds=st.floats(0, 100), protect=st.booleans())
    def load(self, parts: dict[str, int], own: int, seconds: float, protect: bool) -> None:
        tier, name = self.tier, f"a{self.loads}"
        self.loads += 1
        packed = Packed({**{k: SIZES[k] for k in parts}, name: own})
        kept = frozenset(self.there[:1] if protect else ())
        before = {r.name for r in self.there}
        if not tier.residents.make_room(packed, kept):
            assert {r.name for r in self.there} == before, "somebody went for nothing"
            return
        residency = Residency(name, f"/{name}")
        tier.residents.put_in(residency, packed, seconds)
        assert all(r.ready for r in kept)
        self.adapters[name] = residency

    @rule()
    def longest(self) -> None:
        """When nothing else runs, a sequence of the greatest length finds its blocks."""
        for blocks in self.sequences:
            self.tier.manager.release(blocks)
        self.sequences = [[self.tier.manager.take() for _ in range(5)]]

    @precondition(lambda self: self.there)
    @rule(which=st.integers(0, 99), what=st.sampled_from(["pinned", "running", "in_flight"]))
    def hold(self, which: int, what: str) -> None:
        residency = self.there[which % len(self.there)]
        setattr(residency, what, not getattr(residency, what))
        self.tier.residents.used(residency)
        self.tier.residents.begin_step()

    @rule(blocks=st.integers(6, 20))
    def combination(self, blocks: int) -> None:
        """What it is sure of it gets once all others are preempted, until it ends."""
        manager = self.tier.manager
        if manager.claim(blocks):
            for taken in self.sequences:
                manager.release(taken)
            self.sequences = [[manager.take() for _ in range(blocks)]]
        manager.keep_claim(0)

    @precondition(lambda self: self.there)
    @rule(which=st.integers(0, 99))
    def unload(self, which: int) -> None:
        residency = self.there[which % len(self.there)]
        before = self.tier.residents.used_bytes
        freed = self.tier.residents.take_out(residency)
        assert before - freed == self.tier.residents.used_bytes
        residency.pinned = residency.running = False  # type: ignore[assignment]

    @invariant()
    def nothing_is_lost(self) -> None:
        self.tier.check()
        assert all(r.ready for r in self.adapters.values() if r.pinned or r.running)
        assert self.tier.host.slots.keys() == {r.slot for r in self.there}


TestBudgeted = Budgeted.TestCase
TestBudgeted.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_shares_book_what_every_set_of_holders_frees() -> None:
    shares: Shares[str] = Shares()
    shares.add("a", {1: 10, 2: 5})
    shares.add("b", {2: 5, 3: 1})
    shares.add("c", {2: 5})
    assert shares.used == 16
    assert [shares.freed(going) for going in ("a", "ab", "bc", "abc")] == [10, 11, 1, 16]
    assert shares.freed_one_by_one("bac") == [1, 10, 5]
    assert shares.freed("abc", keep=[2, 7]) == 11 and shares.added({2: 5, 9: 2}) == 2
    shares.remove("b")
    shares.remove("c")
    assert shares.alone("a") == shares.freed("a") == 15
    shares.check_integrity()
    shares._alone["a"] += 1
    with pytest.raises(AssertionError, match="a: wrong bytes of its own"):
        shares.check_integrity()
