"""Adapters come and go within their budget, and nobody waits for ever or gets the wrong one."""

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving import until
from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.options import LoadOptions
from deltaserve.kernels.primitives import Bias
from deltaserve.server.engine import loader
from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.core import AdapterInfo, AdapterRef, AdapterState
from deltaserve.server.engine.make import MakeHere
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.observer import NullObserver
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.workers import Urgency
from deltaserve.server.errors import (
    AdapterBusy,
    AdapterConflict,
    AdapterTooLarge,
    AdapterUnavailable,
    AdapterUnknown,
    InvalidRequest,
)


@dataclass
class Packed:
    digest: str
    nbytes: int
    prefix: None = None

    @property
    def memory(self) -> dict[object, int]:
        return {self.digest: self.nbytes}

    def tensors(self) -> tuple[Tensor, ...]:
        return ()


class Host:
    """Records what is installed where. Sizes: the number in the uri."""

    def __init__(self) -> None:
        self.slots: dict[int, str] = {}

    def prepare(self, adapter: Adapter) -> Packed:
        return Packed(adapter.digest, adapter.source_bytes)

    def install(self, slot: int, prepared: Packed) -> None:
        assert slot not in self.slots and slot > 0
        self.slots[slot] = prepared.digest

    def remove(self, slot: int) -> None:
        del self.slots[slot]


class Disk:
    """uri -> content. `gate` holds reads up."""

    def __init__(self) -> None:
        self.content: dict[str, tuple[str, int]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.reads = 0

    def read(self, uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        self.gate.wait()
        self.reads += 1
        if uri not in self.content:
            raise InvalidAdapter(f"{uri} is damaged")
        digest, size = self.content[uri]
        if parent is not None:
            digest, size = f"{parent.digest}-{digest}", size + parent.source_bytes
        return Adapter(digest, "test", {}, source_bytes=size)


class Rig:
    def __init__(self, budget: int, adapters: dict[str, int], loaders: int = 1) -> None:
        self.host, self.disk = Host(), Disk()
        self.disk.content = {f"/{n}": (f"digest-{n}", size) for n, size in adapters.items()}
        self.cache = AdapterCache(
            self.host,
            MakeHere(lambda *what: self.disk.read(*what), self.host),
            ledger=Ledger(budget),
            wake=lambda: None,
            observer=NullObserver(),
            loaders=loaders,
        )

    def until(self, condition: Callable[[], bool], waiting: list[tuple[Residency, ...]]) -> None:
        """Turn the engine's crank."""
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, "nothing happened for five seconds"
            self.cache.step(waiting)
            time.sleep(0.001)

    def load(self, name: str, **how: Any) -> AdapterInfo:
        future = self.cache.load(name, f"/{name}", **how)
        self.until(future.done, [])
        return future.result()


def test_loads_and_unloads_to_the_last_byte() -> None:
    rig = Rig(100, {"a": 30})
    info = rig.load("a")
    assert (info.state, info.resident_bytes, info.digest) == (AdapterState.READY, 30, "digest-a")
    assert rig.cache.used_bytes == 30 and list(rig.host.slots.values()) == ["digest-a"]
    future = rig.cache.unload("a")
    rig.until(future.done, [])
    assert future.result() == 30
    assert rig.cache.used_bytes == 0 and not rig.host.slots
    for call in (rig.cache.get, rig.cache.unload, partial(rig.cache.pin, pinned=True)):
        with pytest.raises(AdapterUnknown) as caught:
            call("a")
        assert caught.value.field == "name"


def test_unload_waits_for_requests_in_flight_and_lets_no_new_ones_in() -> None:
    rig = Rig(100, {"a": 30})
    rig.load("a")
    held = rig.cache.acquire([AdapterRef("a")])
    future = rig.cache.unload("a")
    for _ in range(5):
        rig.cache.step([])
    assert not future.done() and rig.host.slots
    with pytest.raises(AdapterUnknown, match="being unloaded"):
        rig.cache.acquire([AdapterRef("a")])
    with pytest.raises(AdapterBusy, match="being unloaded"):
        rig.cache.load("a", "/a")
    rig.cache.release(held, running=False)
    rig.until(future.done, [])


def test_the_same_name_again() -> None:
    rig = Rig(100, {"a": 30})
    rig.disk.content["/copy"] = ("digest-a", 30)
    rig.disk.content["/other"] = ("digest-x", 30)
    rig.load("a")
    same = rig.cache.load("a", "/copy")
    rig.until(same.done, [])
    assert same.result().digest == "digest-a"
    other = rig.cache.load("a", "/other")
    rig.until(other.done, [])
    with pytest.raises(AdapterConflict, match="registered with digest digest-a"):
        other.result()
    assert rig.cache.get("a").state is AdapterState.READY


def test_two_loads_at_once_are_one() -> None:
    rig = Rig(100, {"a": 30})
    rig.disk.gate.clear()
    futures = [rig.cache.load("a", "/a") for _ in range(3)]
    rig.disk.gate.set()
    rig.until(lambda: all(f.done() for f in futures), [])
    assert {f.result().digest for f in futures} == {"digest-a"}
    assert rig.cache.loads == 1 and len(rig.host.slots) == 1


def test_a_damaged_adapter_fails_its_load_and_nothing_else() -> None:
    rig = Rig(100, {"a": 30})
    rig.load("a")
    future = rig.cache.load("bad", "/bad")
    rig.until(future.done, [])
    with pytest.raises(InvalidAdapter, match="damaged"):
        future.result()
    with pytest.raises(AdapterUnknown):
        rig.cache.acquire([AdapterRef("bad")])
    assert rig.cache.get("a").state is AdapterState.READY


def test_one_that_can_never_fit_is_refused_with_both_sizes() -> None:
    rig = Rig(100, {"huge": 101})
    future = rig.cache.load("huge", "/huge")
    rig.until(future.done, [])
    with pytest.raises(AdapterTooLarge, match=r"needs 101 bytes.*100 bytes in all"):
        future.result()


def same_load_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def test_the_least_recently_used_goes_and_comes_back_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same_load_times(monkeypatch)
    rig = Rig(100, {"a": 40, "b": 40, "c": 40})
    for name in "abc":
        rig.load(name)
    assert [i.state for i in rig.cache.list()] == [
        AdapterState.REGISTERED,
        AdapterState.READY,
        AdapterState.READY,
    ]
    assert rig.cache.used_bytes == 80 and rig.cache.evictions == 1
    waiting = rig.cache.acquire([AdapterRef("a")])
    rig.until(lambda: waiting[0].ready, [waiting])
    assert rig.host.slots[waiting[0].slot] == "digest-a"
    assert rig.cache.used_bytes == 80


def test_pinned_and_running_ones_stay() -> None:
    rig = Rig(100, {"a": 40, "b": 40, "c": 40})
    rig.load("a", pinned=True)
    rig.load("b")
    held = rig.cache.acquire([AdapterRef("b")])
    rig.cache.admitted(held, [()])
    future = rig.cache.load("c", "/c")
    for _ in range(50):
        rig.cache.step([])
        time.sleep(0.002)
    assert not future.done()  # it waits for room
    rig.cache.release(held, running=True)
    rig.until(future.done, [])
    assert rig.cache.get("b").state is AdapterState.REGISTERED
    assert rig.cache.get("a").state is AdapterState.READY


def test_a_file_that_changed_is_not_served_under_the_old_digest() -> None:
    rig = Rig(50, {"a": 40, "b": 40})
    rig.load("a")
    rig.load("b")
    rig.disk.content["/a"] = ("digest-new", 40)
    waiting = rig.cache.acquire([AdapterRef("a")])
    rig.until(lambda: waiting[0].state is AdapterState.FAILED, [waiting])
    assert "changed since" in waiting[0].error
    with pytest.raises(AdapterUnavailable, match="changed since"):
        rig.cache.acquire([AdapterRef("a")])


def test_nor_is_one_whose_parent_changed() -> None:
    rig = Rig(60, {"p": 20, "c": 20, "d": 30})
    rig.load("p")
    rig.load("c", options=LoadOptions(parent="p"))
    assert (rig.cache.get("c").digest, rig.cache.get("c").parent) == ("digest-p-digest-c", "p")
    rig.load("d")
    assert rig.cache.get("c").state is AdapterState.REGISTERED
    rig.disk.content["/p"] = ("digest-new", 20)
    waiting = rig.cache.acquire([AdapterRef("c")])
    rig.until(lambda: waiting[0].state is AdapterState.FAILED, [waiting])
    assert "/p has changed since 'p' was registered" in waiting[0].error


def test_nobody_is_its_own_ancestor() -> None:
    """A load that failed leaves a name that can be registered anew, with its child as parent."""
    rig = Rig(60, {"p": 20, "c": 20, "d": 60})
    rig.load("p")
    rig.load("c", options=LoadOptions(parent="p"))
    with pytest.raises(InvalidRequest, match="p < c < p"):
        rig.cache.load("p", "/p", options=LoadOptions(parent="c"))
    rig.load("d")
    rig.disk.content["/p"] = ("digest-new", 20)
    waiting = rig.cache.acquire([AdapterRef("p")])
    rig.until(lambda: waiting[0].state is AdapterState.FAILED, [waiting])
    for parent in ("c", "p"):
        with pytest.raises((InvalidRequest, AdapterUnavailable)) as error:
            rig.cache.load("p", "/p", options=LoadOptions(parent=parent))
        assert error.value.field == "options.parent"


def test_a_digest_in_the_name_must_match() -> None:
    rig = Rig(100, {"a": 40})
    rig.load("a")
    rig.cache.acquire([AdapterRef("a@digest")])
    with pytest.raises(InvalidRequest, match=r"^model: 'a@' has no digest"):
        rig.cache.acquire([AdapterRef("a@")])
    with pytest.raises(AdapterUnknown, match="has digest"):
        rig.cache.acquire([AdapterRef("a@other")])


def test_thrashing_serves_everybody_in_turn() -> None:
    """Three adapters, room for one: each waiting request gets its turn."""
    rig = Rig(40, {"a": 40, "b": 40, "c": 40})
    for name in "abc":
        rig.load(name)
    queue = [rig.cache.acquire([AdapterRef(n)]) for n in "abcabcabc"]
    served = []
    while queue:
        rig.until(lambda: queue[0][0].ready, queue)
        held = queue.pop(0)
        rig.cache.admitted(held, [()])
        served.append(rig.host.slots[held[0].slot])
        rig.cache.release(held, running=True)
    assert served == [f"digest-{n}" for n in "abcabcabc"]


def test_watchers_see_every_state() -> None:
    rig = Rig(100, {"a": 40})
    seen: list[AdapterState] = []
    end = rig.cache.subscribe(lambda info: seen.append(info.state))
    rig.load("a")
    future = rig.cache.unload("a")
    rig.until(future.done, [])
    end()
    rig.load("a")
    assert seen == [
        AdapterState.LOADING,
        AdapterState.READY,
        AdapterState.UNLOADING,
        AdapterState.UNLOADED,
    ]


def registered(rig: Rig, name: str, **how: Any) -> AdapterInfo:
    return rig.load(name, register_only=True, **how)


def test_one_that_is_only_registered_is_checked_and_loaded_when_it_is_asked_for() -> None:
    rig = Rig(100, {"a": 30})
    seen: list[AdapterState] = []
    rig.cache.subscribe(lambda info: seen.append(info.state))
    info = registered(rig, "a")
    assert (info.state, info.tier, info.digest) == (AdapterState.REGISTERED, "disk", "digest-a")
    assert (info.loads, info.resident_bytes, info.source_bytes) == (0, 0, 30)
    assert (info.format, rig.cache.used_bytes, rig.disk.reads) == ("test", 0, 1)
    assert not rig.host.slots and seen == [AdapterState.LOADING, AdapterState.REGISTERED]
    waiting = rig.cache.acquire([AdapterRef("a@digest-a")])
    rig.until(lambda: waiting[0].ready, [waiting])
    assert rig.cache.get("a").loads == 1 and rig.disk.reads == 2
    assert rig.cache.used_bytes == 30 and list(rig.host.slots.values()) == ["digest-a"]


def test_what_is_wrong_with_it_is_said_when_it_is_registered() -> None:
    rig = Rig(100, {"huge": 101, "a": 30})
    for name, error, said in (
        ("bad", InvalidAdapter, "damaged"),
        ("huge", AdapterTooLarge, "needs 101 bytes"),
    ):
        with pytest.raises(error, match=said):
            registered(rig, name)
        with pytest.raises(AdapterUnknown):
            rig.cache.get(name)
    with pytest.raises(InvalidRequest, match="register_only: a pinned adapter"):
        rig.cache.load("a", "/a", register_only=True, pinned=True)


def test_a_file_that_changes_or_goes_after_registration_fails_who_asks_for_it_alone() -> None:
    rig = Rig(100, {"a": 30, "b": 30, "c": 30})
    for name in "abc":
        registered(rig, name)
    rig.disk.content["/a"] = ("digest-new", 30)
    del rig.disk.content["/b"]
    waiting = [rig.cache.acquire([AdapterRef(n)]) for n in "abc"]
    rig.until(lambda: waiting[2][0].ready and not waiting[1][0].loading, waiting)
    assert [w[0].state for w in waiting[:2]] == [AdapterState.FAILED] * 2
    for name, said in (("a", "changed since"), ("b", "is damaged")):
        with pytest.raises(AdapterUnavailable, match=said):
            rig.cache.acquire([AdapterRef(name)])


def test_a_load_joins_a_registration_and_the_other_way_round() -> None:
    rig = Rig(100, {"a": 30})
    rig.disk.gate.clear()
    checked = rig.cache.load("a", "/a", register_only=True)
    loaded = rig.cache.load("a", "/a")
    again = rig.cache.load("a", "/a", register_only=True)
    rig.disk.gate.set()
    rig.until(lambda: loaded.done() and again.done(), [])
    assert checked.result().digest == again.result().digest == "digest-a"
    assert loaded.result().state is AdapterState.READY
    assert registered(rig, "a").state is AdapterState.READY
    rig.cache.load("b", "/b", register_only=True)
    rig.disk.content["/a"] = ("digest-new", 30)
    with pytest.raises(AdapterConflict):
        registered(rig, "a")


def test_one_that_is_not_in_memory_takes_at_most_4_kib() -> None:
    """Registered alone, and evicted again: what the loads of many leave behind, to the byte."""
    count = 300
    rig = Rig(10, {f"{i:04}-{'n' * 100}": 10 for i in range(count)})
    names = [uri[1:] for uri in rig.disk.content]

    def read(uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        modules = {f"model.layers.{i}.mlp.up_proj": (Bias(torch.zeros(8)),) for i in range(64)}
        notes = (f"{uri}: {'a long note ' * 500}",)
        return Adapter(f"{uri:>64}", "test", modules, source_bytes=10, notes=notes)

    rig.disk.read = read  # type: ignore[method-assign]
    rig.load(names[0])
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for register_only in (True, False):
            for name in names[1:]:
                rig.load(name, register_only=register_only)
            gc.collect()
            held = tracemalloc.get_traced_memory()[0] - before
            assert held / (count - 1) < 4096, register_only
    finally:
        tracemalloc.stop()
    assert rig.cache.evictions == count - 1 and len(rig.cache.list()) == count


def test_what_a_request_waits_for_is_read_before_what_is_registered() -> None:
    rig = Rig(100, {n: 10 for n in "abcdef"})
    registered(rig, "a")
    order: list[str] = []
    read = rig.disk.read

    def noting(uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        order.append(uri)
        return read(uri, options, parent)

    rig.disk.read = noting  # type: ignore[method-assign]
    rig.disk.gate.clear()
    futures = [rig.cache.load("b", "/b", register_only=True)]
    rig.until(lambda: order == ["/b"], [])
    futures += [rig.cache.load(n, f"/{n}", register_only=True) for n in "cd"]
    futures.append(rig.cache.load("e", "/e"))
    waiting = rig.cache.acquire([AdapterRef("a")])
    rig.cache.step([waiting])
    rig.disk.gate.set()
    rig.until(lambda: all(f.done() for f in futures), [waiting])
    assert order == ["/b", "/a", "/e", "/c", "/d"]


def test_a_pinned_adapter_that_is_not_in_memory_needs_room_too() -> None:
    rig = Rig(100, {"a": 60, "b": 50, "p": 20})
    rig.load("p", pinned=True)
    rig.load("a")
    rig.load("b")
    rig.cache.pin("a", True)
    both = rig.cache.acquire([AdapterRef("a"), AdapterRef("b")])
    assert not both[0].ready and both[1].ready
    with pytest.raises(AdapterTooLarge, match="need 110 bytes beside 20 bytes of pinned"):
        rig.cache.check_room(both)


def begun(rig: Rig) -> list[str]:
    """The uris that are read from now on, in the order in which that begins."""
    order: list[str] = []
    read = rig.disk.read

    def noting(uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        order.append(uri)
        return read(uri, options, parent)

    rig.disk.read = noting  # type: ignore[method-assign]
    return order


def test_waiting_requests_adapters_are_loaded_ahead_in_their_order() -> None:
    rig = Rig(100, {n: 20 for n in "abcde"}, loaders=2)
    for name in "abcde":
        registered(rig, name)
    order = begun(rig)
    rig.disk.gate.clear()
    waiting = [rig.cache.acquire([AdapterRef(n)]) for n in "abacde"]
    rig.cache.step(waiting)
    rig.until(lambda: len(order) == 2, waiting)
    assert set(order) == {"/a", "/b"}  # as many at once as there are loaders
    rig.disk.gate.set()
    rig.until(lambda: all(w[0].ready for w in waiting), waiting)
    assert order[2:] == ["/c", "/d", "/e"] and rig.cache.evictions == 0


def test_one_that_finds_no_room_does_not_hold_up_those_behind_it() -> None:
    rig = Rig(100, {"x": 60, "big": 60, "small": 30})
    rig.load("big")
    rig.load("x")
    registered(rig, "small")
    running = rig.cache.acquire([AdapterRef("x")])
    rig.cache.admitted(running, [()])
    waiting = [rig.cache.acquire([AdapterRef(n)]) for n in ("big", "small")]
    rig.until(lambda: waiting[1][0].ready, waiting)
    assert not waiting[0][0].ready and waiting[0][0].crowded


def test_what_is_loaded_ahead_takes_nothing_from_those_before_it() -> None:
    """A request comes in between while the adapter of a later one is on its way, and wants what
    would have been evicted for that."""
    rig = Rig(80, {"a": 40, "b": 40, "c": 40}, loaders=2)
    registered(rig, "c")
    rig.load("b")
    rig.load("a")
    rig.disk.gate.clear()
    running = rig.cache.acquire([AdapterRef("a")])
    last = rig.cache.acquire([AdapterRef("c")])
    rig.cache.step([running, last])
    assert last[0].loading
    between = rig.cache.acquire([AdapterRef("b")])
    rig.disk.gate.set()
    rig.until(lambda: bool(rig.cache._loader.arrived), [running, between, last])
    for _ in range(5):
        rig.cache.step([running, between, last])
    assert between[0].ready and running[0].ready and not last[0].ready
    rig.cache.release(between, running=False)
    rig.until(lambda: last[0].ready, [running, last])
    assert running[0].ready


def test_no_more_is_loaded_ahead_than_finds_room() -> None:
    """What arrived and has no room is in memory all the same."""
    rig = Rig(100, {n: 40 for n in "abcdef"}, loaders=2)
    for name in "cdef":
        registered(rig, name)
    rig.load("a")
    rig.load("b")
    order = begun(rig)
    waiting = [rig.cache.acquire([AdapterRef(n)]) for n in "cdef"]
    rig.disk.gate.clear()
    rig.cache.step(waiting)
    held = rig.cache.acquire([AdapterRef("a"), AdapterRef("b")])
    rig.cache.admitted(held, [(), ()])
    rig.disk.gate.set()
    rig.until(lambda: len(rig.cache._loader.arrived) == len(order) > 0, waiting)
    for _ in range(20):
        rig.cache.step(waiting)
    assert len(order) <= 2
    rig.cache.release(held, running=True)
    rig.until(lambda: waiting[0][0].ready and waiting[1][0].ready, waiting)


def test_requests_for_an_adapter_in_memory_read_nothing() -> None:
    rig = Rig(100, {"a": 30})
    registered(rig, "a")
    first = rig.cache.acquire([AdapterRef("a")])
    rig.until(lambda: first[0].ready, [first])
    reads = rig.disk.reads
    for _ in range(20):
        held = rig.cache.acquire([AdapterRef("a")])
        rig.cache.step([held])
        rig.cache.admitted(held, [()])
        rig.cache.release(held, running=True)
    assert rig.disk.reads == reads == 2 and rig.cache.get("a").loads == 1


def test_thousands_of_registered_adapters_do_not_slow_a_step_down() -> None:
    """A step looks at those that wait, arrive or leave, not at all there are."""
    rig = Rig(100, {f"{i}": 10 for i in range(300)})
    for i in range(300):
        registered(rig, f"{i}")
    rig.load("0")
    waiting = [rig.cache.acquire([AdapterRef("0")])]
    looked: list[str] = []

    class Watched(dict[str, Residency]):
        def __iter__(self) -> Any:
            looked.append("names")
            return super().__iter__()

        def values(self) -> Any:
            looked.append("all of them")
            return super().values()

    rig.cache._registry._by_name = Watched(rig.cache._registry._by_name)
    rig.cache.step(waiting)
    assert not looked
    rig.cache.list()
    assert looked


def test_one_adapter_comes_or_goes_in_a_step() -> None:
    """The others do in the steps after it, which the cache asks for."""
    rig = Rig(100, {"a": 10, "b": 20, "c": 30, "huge": 200})
    woken = threading.Event()
    rig.cache._wake = woken.set
    names = ("a", "b", "huge", "c")
    loads = [rig.cache.load(name, f"/{name}") for name in names]
    until(lambda: len(rig.cache._loader.arrived) == len(names), "all are read")
    for count in (1, 2, 3):
        woken.clear()
        rig.cache.step([])
        assert len(rig.host.slots) == count and woken.is_set() == (count < 3)
    with pytest.raises(AdapterTooLarge):  # it took nobody's turn
        loads[2].result(0)
    held = rig.cache.acquire([AdapterRef("b")])
    unloads = [rig.cache.unload(name) for name in "abc"]
    for count in (2, 1):
        woken.clear()
        rig.cache.step([])
        assert len(rig.host.slots) == count and woken.is_set() == (count == 2)
    assert [u.done() for u in unloads] == [True, False, True]
    rig.cache.release(held, running=False)
    rig.cache.step([])
    assert unloads[1].done() and not rig.host.slots


def test_who_finds_no_room_keeps_its_turn() -> None:
    """What came later, and found some, does not get before it."""
    rig = Rig(100, {"big": 90, "large": 85, "small": 10, "held": 20})
    rig.load("held")
    held = rig.cache.acquire([AdapterRef("held")])
    rig.cache.admitted(held, [()])
    names = ("big", "large", "small")
    for i, name in enumerate(names):
        rig.cache.load(name, f"/{name}")
        until(lambda i=i: len(rig.cache._loader.arrived) == i + 1, "it is read")  # type: ignore[misc]
    rig.cache.step([])
    assert [a.residency.name for a in rig.cache._loader.arrived] == ["big", "large"]
    assert rig.cache.get("small").state is AdapterState.READY


def test_the_first_load_says_what_a_name_stands_for() -> None:
    """Though the second is read before it."""
    rig = Rig(100, {"a": 10, "b": 20}, loaders=2)
    read, gate = rig.disk.read, threading.Event()

    def slow(uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        assert uri != "/a" or gate.wait(30)
        return read(uri, options, parent)

    rig.disk.read = slow  # type: ignore[method-assign]
    first, other = rig.cache.load("x", "/a"), rig.cache.load("x", "/b", pinned=True)
    until(lambda: rig.disk.reads == 1, "the second is read")
    rig.cache._loader._workers.submit(Urgency.ASKED, (idle := threading.Event()).set)
    assert idle.wait(30)  # and what came of it is noted
    assert not other.done()
    gate.set()
    rig.until(lambda: first.done() and other.done(), [])
    assert first.result().digest == "digest-a" and not rig.cache.get("x").pinned
    with pytest.raises(AdapterConflict):
        other.result()
    failing = rig.cache.load("y", "/none"), rig.cache.load("y", "/b")
    rig.until(lambda: all(f.done() for f in failing), [])
    with pytest.raises(InvalidAdapter):
        failing[0].result()
    with pytest.raises((AdapterUnavailable, InvalidAdapter)):
        failing[1].result()
