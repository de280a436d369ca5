"""Arrivals: loaded adapters on their way into memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from deltaserve.adapters.adapter import Adapter
from deltaserve.kernels.backend import Courier, Parcel
from deltaserve.server.engine.core import AdapterState, Tier
from deltaserve.server.engine.host_tier import HostTier
from deltaserve.server.engine.loader import Loader
from deltaserve.server.engine.observer import Observer
from deltaserve.server.engine.prefetch import needed_up_to
from deltaserve.server.engine.registry import Registry
from deltaserve.server.engine.residency import Arrival, Futures, Residency
from deltaserve.server.engine.residents import Residents
from deltaserve.server.engine.shares import Memory
from deltaserve.server.engine.workers import Urgency
from deltaserve.server.errors import AdapterTooLarge

log = logging.getLogger(__name__)


class Arrivals:
    """Used under the registry's lock, and but for `reload` on the engine thread alone. courier,
    host_tier, wake: as the cache has them. loads: adapters that came into memory. coming: what the
    courier has taken and not brought yet."""

    def __init__(
        self,
        registry: Registry,
        residents: Residents,
        loader: Loader,
        observer: Observer,
        wake: Callable[[], None],
        courier: Courier | None,
        host_tier: HostTier[Arrival] | None,
    ) -> None:
        self.loads = 0
        self.coming: list[tuple[Arrival, Parcel]] = []
        self._registry = registry
        self._residents = residents
        self._loader = loader
        self._observer = observer
        self._wake = wake
        self._courier = courier
        self._host_tier = host_tier

    def publish_one(
        self, waiting: Sequence[Sequence[Residency]], head: Sequence[Residency]
    ) -> tuple[bool, bool]:
        """The first arrival that there is room for, and all before it that do not come into memory.
        -> whether one came in, whether others are left that were not looked at."""
        arrived, crowded, loads = self._loader.arrived, list[Arrival](), self.loads
        while arrived and self.loads == loads:
            arrival = arrived.popleft()
            if not self._publish(arrival, needed_up_to(arrival.residency, waiting) or head):
                crowded.append(arrival)
        more = bool(arrived)
        arrived.extendleft(reversed(crowded))
        return self.loads > loads, more

    def land(self) -> bool:
        """Publish the first that the courier has brought. -> whether there was one."""
        pair = next((pair for pair in self.coming if pair[1].arrived), None)
        if pair is None:
            return False
        arrival, parcel = pair
        self.coming.remove(pair)
        parcel.publish()
        self._put_in(arrival, booked=True)
        parcel.finish()
        return True

    def reload(self, residency: Residency, urgency: Urgency) -> None:
        """It was evicted and is wanted, if only by requests that an unload waits for."""
        if residency.state is AdapterState.REGISTERED:
            residency.state = AdapterState.LOADING
        kept = None if self._host_tier is None else self._host_tier.take(residency)
        if kept is None:
            self._loader.start(residency, urgency)
            return
        residency.loading = True
        self._registry.notify(residency)
        self._loader.arrived.append(replace(kept, at=time.perf_counter()))
        self._wake()

    def close(self) -> None:
        """Let go of what is on its way."""
        for arrival, parcel in self.coming:
            parcel.cancel()
            self._residents.unbook(arrival.residency)
        while not all(parcel.arrived for _, parcel in self.coming):
            time.sleep(1e-3)  # copies that were launched already
        for _, parcel in self.coming:
            parcel.finish()
        self.coming.clear()

    def _publish(self, arrival: Arrival, protected: Collection[Residency]) -> bool:
        """False if there is no room now. Nothing is evicted unless there will be room."""
        residency = arrival.residency
        if arrival.error is not None:
            self._fail(residency, arrival.error)
            return True
        adapter, prepared = arrival.adapter, arrival.prepared
        assert adapter is not None
        try:
            memory: Memory = {residency: arrival.nbytes}
            if prepared is not None:
                memory = prepared.memory
            self._residents.check_room((), f"adapter {residency.name!r} needs", memory)
        except AdapterTooLarge as error:
            self._fail(residency, error)
            return True
        if prepared is None:
            self._observe(arrival)
            self._checked(residency, adapter, arrival.nbytes)
            return True
        residency.nbytes = arrival.nbytes
        residency.crowded = not self._residents.make_room(prepared, frozenset(protected))
        if residency.crowded:
            return False
        if self._courier is None:
            self._put_in(arrival, booked=False)
            return True
        parcel = self._courier.send(prepared)
        if parcel is None:
            return False
        self._residents.book(residency, prepared)
        self.coming.append((arrival, parcel))
        return True

    def _put_in(self, arrival: Arrival, *, booked: bool) -> None:
        """Have it served from now on. booked: its bytes are taken."""
        residency, adapter, prepared = arrival.residency, arrival.adapter, arrival.prepared
        assert adapter is not None and prepared is not None
        try:
            self._residents.put_in(residency, prepared, arrival.seconds, booked=booked)
        except Exception as error:  # a bug, but one adapter's: the others are served on
            log.exception("installing adapter %r failed", residency.name)
            if booked:
                self._residents.unbook(residency)
            self._fail(residency, error)
            return
        residency.describe(adapter)
        residency.tier = Tier.HOST if self._courier is None else Tier.DEVICE
        residency.structure, residency.prefix = adapter, prepared.prefix
        residency.loads += 1
        self.loads += 1
        residency.loaded_at = time.time()
        residency.error, residency.loading = "", False
        self._observe(arrival)
        if residency.state is not AdapterState.UNLOADING:
            self._registry.change(residency, AdapterState.READY)
        self._observer.on_adapter_load(residency.name, arrival.seconds)
        self._answer(residency, residency.waiting_for_load, residency.waiting_for_check)

    def _checked(self, residency: Residency, adapter: Adapter, nbytes: int) -> None:
        """It is registered; who has asked for more meanwhile gets it."""
        residency.describe(adapter)
        residency.nbytes, residency.loading = nbytes, False
        if residency.state is not AdapterState.UNLOADING:
            self._registry.change(residency, AdapterState.REGISTERED)
        self._answer(residency, residency.waiting_for_check)
        residency.shrink()
        if residency.waiting_for_load and not residency.loading:
            self.reload(residency, Urgency.ASKED)

    def _observe(self, arrival: Arrival) -> None:
        stages = {**arrival.stages, "publish": time.perf_counter() - arrival.at}
        for stage, seconds in stages.items():
            self._observer.on_load_stage(stage, seconds)
        arrival.residency.cached = arrival.cached
        if arrival.hit is not None:
            self._observer.on_cache(arrival.hit)

    def _answer(self, residency: Residency, *waiting: Futures) -> None:
        for futures in waiting:
            for future in futures:
                future.set_result(residency.info())
            futures.clear()

    def _fail(self, residency: Residency, error: Exception) -> None:
        residency.error, residency.loading = str(error), False
        self._registry.change(residency, AdapterState.FAILED)
        for futures in (residency.waiting_for_load, residency.waiting_for_check):
            for future in futures:
                future.set_exception(error)
            futures.clear()
        if not residency.format:  # it never was an adapter
            self._registry.forget(residency.name)
