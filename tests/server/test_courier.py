"""Adapters that come to a device beside the steps: served only once they are there, counted from
the moment they have a place; those that had to leave it are taken up again without a load."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_adapter_cache import Packed, Rig

from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.core import AdapterRef, AdapterState
from deltaserve.server.engine.host_tier import HostTier
from deltaserve.server.engine.make import MakeHere
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.observer import NullObserver


class Parcel:
    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.arrived = False
        self.said: list[str] = []

    def cancel(self) -> None:
        self.said.append("cancel")
        self.arrived = True

    def publish(self) -> None:
        assert self.arrived
        self.said.append("publish")

    def finish(self) -> None:
        assert self.arrived
        self.said.append("finish")


class Courier:
    def __init__(self) -> None:
        self.parcels: list[Parcel] = []
        self.place = True
        self.pumps = 0
        self.left = 0

    def send(self, packed: Any) -> Parcel | None:
        if not self.place:
            return None
        self.parcels.append(Parcel(packed))
        return self.parcels[-1]

    def pump(self) -> bool:
        self.pumps += 1
        return self.left > 0


class DeviceRig(Rig):
    def __init__(self, budget: int, adapters: dict[str, int], host_bytes: int = 0) -> None:
        super().__init__(budget, adapters)
        self.courier, self.tier = Courier(), HostTier[Any](host_bytes)
        self.wakes = 0
        self.cache = AdapterCache(
            self.host,
            MakeHere(lambda *what: self.disk.read(*what), self.host),
            ledger=Ledger(budget),
            wake=self._woken,
            observer=NullObserver(),
            courier=self.courier,
            host_tier=self.tier,
        )

    def _woken(self) -> None:
        self.wakes += 1

    def sent(self, count: int) -> Parcel:
        self.until(lambda: len(self.courier.parcels) == count, [])
        return self.courier.parcels[-1]

    def bring(self, name: str, count: int) -> Parcel:
        future = self.cache.load(name, f"/{name}")
        parcel = self.sent(count)
        parcel.arrived = True
        self.until(future.done, [])
        return parcel


def test_it_is_served_only_once_it_has_arrived() -> None:
    rig = DeviceRig(100, {"a": 30})
    future = rig.cache.load("a", "/a")
    parcel = rig.sent(1)
    wakes, pumps = rig.wakes, rig.courier.pumps
    for _ in range(5):
        rig.cache.step([])
        rig.cache.check_integrity()
    assert rig.cache.used_bytes == 30  # counted from the start
    assert not future.done() and not rig.host.slots and parcel.said == []
    assert rig.courier.pumps - pumps == 5
    assert rig.cache.expecting and rig.wakes == wakes  # the engine may rest, not sleep
    rig.courier.left = 1
    rig.cache.step([])
    assert rig.wakes == wakes + 1  # nor rest while there is work
    rig.courier.left = 0
    parcel.arrived = True
    rig.cache.step([])
    assert not rig.cache.expecting
    assert future.result(0).state is AdapterState.READY and len(rig.host.slots) == 1
    assert parcel.said == ["publish", "finish"]
    wakes = rig.wakes
    rig.cache.step([])
    assert rig.wakes == wakes
    rig.cache.check_integrity()


def test_what_is_on_its_way_is_not_evicted_for_another() -> None:
    rig = DeviceRig(50, {"a": 30, "b": 30})
    first = rig.cache.load("a", "/a")
    parcel = rig.sent(1)
    rig.cache.load("b", "/b")
    for _ in range(20):
        rig.cache.step([])
    assert len(rig.courier.parcels) == 1 and rig.cache.used_bytes == 30
    parcel.arrived = True
    rig.until(first.done, [])
    assert rig.sent(2).packed.digest == "digest-b"  # now a makes way
    rig.cache.check_integrity()
    assert rig.cache.used_bytes == 30 and not rig.host.slots


def test_no_place_is_tried_again() -> None:
    rig = DeviceRig(100, {"a": 30})
    rig.courier.place = False
    future = rig.cache.load("a", "/a")
    rig.until(lambda: rig.disk.reads == 1, [])
    for _ in range(20):
        rig.cache.step([])
    assert rig.cache.used_bytes == 0
    rig.courier.place = True
    rig.sent(1).arrived = True
    rig.until(future.done, [])
    rig.cache.check_integrity()


def test_one_that_cannot_be_installed_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = DeviceRig(100, {"a": 30})
    future = rig.cache.load("a", "/a")
    parcel = rig.sent(1)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rig.host, "install", fail)
    parcel.arrived = True
    rig.until(future.done, [])
    assert isinstance(future.exception(), RuntimeError)
    assert parcel.said == ["publish", "finish"] and rig.cache.used_bytes == 0


def test_the_end_cancels_what_is_on_its_way() -> None:
    rig = DeviceRig(100, {"a": 30})
    rig.cache.load("a", "/a")
    parcel = rig.sent(1)
    rig.cache.close()
    assert parcel.said == ["cancel", "finish"] and rig.cache.used_bytes == 0


def test_an_unload_waits_for_what_is_on_its_way() -> None:
    """A request made it come again, and was given up."""
    rig = DeviceRig(50, {"a": 30, "b": 30})
    rig.bring("a", 1)
    rig.bring("b", 2)  # a had to go
    wanted = rig.cache.acquire([AdapterRef("a")])
    unloaded = rig.cache.unload("a")  # and lets that one request end
    rig.until(lambda: len(rig.courier.parcels) == 3, [wanted])
    rig.cache.release(wanted, running=False)
    for _ in range(5):
        rig.cache.step([])
    assert not unloaded.done()
    rig.courier.parcels[-1].arrived = True
    rig.until(unloaded.done, [])
    assert unloaded.result() == 30 and rig.cache.used_bytes == 0 and not rig.host.slots
    rig.cache.check_integrity()


def test_what_was_evicted_comes_back_without_a_load() -> None:
    rig = DeviceRig(50, {"a": 30, "b": 30}, host_bytes=40)
    rig.bring("a", 1)
    rig.bring("b", 2)
    assert rig.tier.used == 30 and rig.disk.reads == 2
    wanted, wakes = rig.cache.acquire([AdapterRef("a")]), rig.wakes
    rig.cache.step([wanted])
    assert rig.wakes > wakes  # the next step takes it up
    rig.until(lambda: len(rig.courier.parcels) == 3, [wanted])
    assert rig.courier.parcels[-1].packed is rig.courier.parcels[0].packed
    assert rig.disk.reads == 2 and rig.tier.used == 30  # b went there for it
    rig.courier.parcels[-1].arrived = True
    rig.until(lambda: wanted[0].ready, [wanted])
    rig.cache.release(wanted, running=False)
    unloaded = rig.cache.unload("b")
    rig.until(unloaded.done, [])
    assert rig.tier.used == 0
    rig.tier.check_integrity()


def test_the_host_tier_keeps_within_its_budget_what_is_worth_most() -> None:
    rng = random.Random(0)
    tier = HostTier[int](100)
    assert tier.keep("dear", 0, 60, uses=9, seconds=5.0)
    assert not tier.keep("cheap", 1, 60, uses=1, seconds=0.1) and "dear" in tier
    assert tier.keep("small", 2, 40, uses=1, seconds=0.1)
    assert tier.keep("dearer", 3, 50, uses=99, seconds=5.0)
    assert "dear" not in tier and tier.take("dearer") == 3 and tier.take("dearer") is None
    assert not tier.keep("huge", 4, 101, uses=1000, seconds=5.0)
    held: dict[int, int] = {}
    for i in range(2000):
        key = rng.randrange(30)
        if rng.random() < 0.3:
            found = tier.take(key)
            assert found is None or found == held[key]
        elif tier.keep(key, i, rng.randrange(1, 40), uses=rng.randrange(5), seconds=rng.random()):
            held[key] = i
        tier.check_integrity()
    assert tier.evictions > 0


def test_a_tier_without_a_budget_keeps_nothing() -> None:
    tier = HostTier[Any](0)
    assert not tier.keep("a", SimpleNamespace(), 1, uses=1, seconds=1.0) and "a" not in tier
