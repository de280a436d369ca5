"""AdapterCache: every registered adapter, and which of them are in memory.

Names are registered from any thread. Reading, checking, lowering and packing run on loader
threads; only the engine thread publishes a loaded adapter to the model or takes it out, between
two steps, so a step always sees whole adapters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.kernels.backend import Courier, Parcel
from deltaserve.server.engine.core import AdapterInfo, AdapterRef, AdapterState
from deltaserve.server.engine.discard import Discard
from deltaserve.server.engine.host_tier import HostTier
from deltaserve.server.engine.loader import Loader
from deltaserve.server.engine.make import Make
from deltaserve.server.engine.masks import Chosen
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.observer import Observer
from deltaserve.server.engine.prefetch import needed_up_to, to_load
from deltaserve.server.engine.registry import Infos, Registry, check_free
from deltaserve.server.engine.residency import Arrival, Futures, Residency
from deltaserve.server.engine.residents import Host, Residencies, Residents
from deltaserve.server.engine.shares import Memory
from deltaserve.server.engine.workers import Urgency
from deltaserve.server.errors import (
    AdapterBusy,
    AdapterConflict,
    AdapterTooLarge,
    AdapterUnavailable,
    InvalidRequest,
    RequestError,
    ShuttingDown,
)

if TYPE_CHECKING:
    from deltaserve.server.engine.own_text import OwnTexts
    from deltaserve.server.engine.text import Text

log = logging.getLogger(__name__)


class AdapterCache:
    """make: called on loader threads. ledger: of the memory that resident adapters take.
    wake: called from any thread when the engine thread has something to do here. loaders: threads
    that load. courier: brings what was loaded to a device; without one it is published where it is.
    host_tier: has what was evicted from there."""

    def __init__(
        self,
        host: Host,
        make: Make,
        *,
        ledger: Ledger,
        wake: Callable[[], None],
        observer: Observer,
        loaders: int = 1,
        courier: Courier | None = None,
        host_tier: HostTier[Arrival] | None = None,
    ) -> None:
        self.loads = 0
        self._wake = wake
        self._observer = observer
        self._registry = Registry()
        self._lock = self._registry.lock
        self._discard = Discard()
        self._residents = Residents(
            host, ledger, self._evicted, self._lock, self._discard, self._evicting
        )
        self._courier = courier
        self._host_tier = host_tier
        self._coming: list[tuple[Arrival, Parcel]] = []
        self._leaving: Residencies = []
        self._loader = Loader(self._registry, make, wake, loaders)

    # From any thread:

    def read_texts(self, texts: OwnTexts) -> None:
        """Read the tokenizers that adapters bring, from the first load on."""
        self._loader.texts = texts

    def own_text(self, called: str) -> Future[Text | None]:
        """The tokenizer that a registered adapter brings, if it does: known once it was loaded or
        checked for the first time. called: as in `acquire`."""
        with self._lock:
            residency = self._registry.resolve(called)
            done: Future[Text | None] = self._registry.promise()
            if residency.text_read or self._loader.texts is None:
                done.set_result(residency.own_text)
            else:
                self._loader.text(residency, done)
        return done

    @property
    def budget(self) -> int:
        """Bytes that resident adapters may take together at most."""
        return self._residents.ledger.adapter_most

    @property
    def used_bytes(self) -> int:
        return self._residents.used_bytes

    @property
    def evictions(self) -> int:
        return self._residents.evictions

    def load(
        self,
        name: str,
        uri: str,
        *,
        pinned: bool = False,
        options: LoadOptions = DEFAULT,
        patch: bool = False,
        register_only: bool = False,
    ) -> Future[AdapterInfo]:
        """Register `name` and make it resident. The same content under the same name is fine any
        number of times; other content is an AdapterConflict. A parent must be registered. patch:
        it will be part of every request, so it is pinned, and stays. register_only: read and check
        it, and load it when a request asks for it; InvalidRequest for one that is pinned."""
        if register_only and (pinned or patch):
            raise InvalidRequest(
                "register_only: a pinned adapter is in memory always; leave out one of the two",
                field="register_only",
            )
        with self._lock:
            if self._registry.closed:
                raise ShuttingDown("the server is shutting down and loads no adapters")
            options = self._registry.parented(name, options)
            known = self._registry.get(name)
            if known is not None and known.unloading is not None:
                raise AdapterBusy(
                    f"adapter {name!r} is being unloaded: load it again when that is done",
                    field="name",
                )
            done: Future[AdapterInfo] = self._registry.promise()
            if known is None or known.state is AdapterState.FAILED:
                residency = Residency(name, uri, options, pinned or patch, patch)
                residency.waiting(register_only).append(done)
                self._registry.add(residency)
                self._loader.start(residency, Urgency.WHENEVER if register_only else Urgency.ASKED)
            else:
                self._compare(known, uri, options, pinned, register_only, done)
        return done

    def unload(self, name: str) -> Future[int]:
        """Take no new requests for it, let the others finish, free it. -> bytes freed. AdapterBusy
        for the parent of a registered adapter: what was evicted could not be loaded again."""
        with self._lock:
            residency = self._registry.find(name)
            check_free(residency)
            if residency.unloading is None:
                children = self._registry.children(name)
                if children:
                    raise AdapterBusy(
                        f"adapter {name!r} is the parent of {', '.join(children[:8])}: "
                        "unload those first",
                        field="name",
                    )
                if residency.state is AdapterState.LOADING:
                    raise AdapterBusy(
                        f"adapter {name!r} is being loaded: unload it when that is done",
                        field="name",
                    )
                residency.unloading = self._registry.promise()
                self._leaving.append(residency)
                self._registry.change(residency, AdapterState.UNLOADING)
            future = residency.unloading
        self._wake()
        return future

    def get(self, name: str) -> AdapterInfo:
        with self._lock:
            return self._registry.find(name).info()

    def list(self) -> Infos:
        """All registered adapters, by name. The lock is taken for each of them alone: they may be
        thousands, and a step waits for it."""
        found = []
        for residency in self._registry.all():
            with self._lock:
                found.append(residency.info())
        return found

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """A pinned adapter is never evicted."""
        with self._lock:
            residency = self._registry.find(name)
            if not pinned:
                check_free(residency)
            residency.pinned = pinned
            self._registry.notify(residency)
            info = residency.info()
        self._wake()
        return info

    def subscribe(self, callback: Callable[[AdapterInfo], None]) -> Callable[[], None]:
        """Call back at every change of state, from whatever thread makes it; the result ends it."""
        return self._registry.subscribe(callback)

    def acquire(self, refs: Iterable[AdapterRef]) -> tuple[Residency, ...]:
        """The adapters of a new request, counted as in flight until `release`."""
        with self._lock:
            found = tuple(self._registry.resolve(ref.name) for ref in refs)
            for residency in found:
                residency.in_flight += 1
                residency.last_used = time.time()
                self._residents.used(residency)
            return found

    def release(
        self,
        residencies: Sequence[Residency],
        *,
        running: bool,
        chosen: Sequence[Chosen] = (),
    ) -> None:
        """The request is done. running: it had been admitted to a batch, with the chosen modules,
        and this is the engine thread."""
        with self._lock:
            for residency, modules in zip(residencies, chosen, strict=False):
                self._residents.leave(residency, modules)
            for residency in residencies:
                residency.in_flight -= 1
                residency.running -= int(running)
                residency.last_used = time.time()
                assert residency.in_flight >= residency.running >= 0
            news = bool(self._loader.arrived) or any(r.unloading is not None for r in residencies)
        if news:  # it may be what an unload or a load without room waited for
            self._wake()

    def close(self) -> None:
        """Take no more loads; fail the loads and unloads that are not done. No request runs any
        more: the adapters leave the model, which another engine may use next."""
        with self._lock:
            self._registry.closed = True
        self._loader.close()
        self._registry.close()
        with self._lock:
            for arrival, parcel in self._coming:
                parcel.cancel()
                self._residents.unbook(arrival.residency)
            while not all(parcel.arrived for _, parcel in self._coming):
                time.sleep(1e-3)  # copies that were launched already
            for _, parcel in self._coming:
                parcel.finish()
            self._coming.clear()
            self._residents.clear()
        self._discard.close()

    # On the engine thread:

    def step(self, waiting: Sequence[Sequence[Residency]]) -> None:
        """Between two steps: publish what arrived, finish unloads, start the loads that waiting
        requests (their adapters, in the order they will be served) need. One adapter comes or goes
        in a step, as that takes about a millisecond; the others do in the next."""
        with self._lock:
            self._residents.begin_step()
            landed = self._land()
            head = next((w for w in waiting if not all(r.ready for r in w)), ())
            changed, more = self._publish_one(waiting, head)
            changed = changed or landed
            coming = {arrival.residency for arrival, _ in self._coming}
            for residency in [r for r in self._leaving if not r.in_flight and r not in coming]:
                if residency.ready and changed:
                    more = True
                else:
                    changed = changed or residency.ready
                    self._finish_unload(residency)
            for residency in to_load(waiting, head, self._loader, self._residents):
                self._reload(residency, Urgency.WANTED)
            self._residents.promise([*head, *(a.residency for a in self._loader.arrived)])
            if self._courier is not None:
                self._courier.pump()
        if more or self._coming:  # nobody else says when what is coming has arrived
            self._wake()

    def admitted(
        self, residencies: Sequence[Residency], chosen: Sequence[Chosen]
    ) -> tuple[int, ...]:
        """A request was taken into the batch: its adapters stay. -> the slot of each, with the
        chosen of its modules."""
        with self._lock:
            for residency in residencies:
                residency.running += 1
            pairs = zip(residencies, chosen, strict=True)
            return tuple(self._residents.enter(r, modules) for r, modules in pairs)

    def withdrawn(self, residencies: Sequence[Residency], chosen: Sequence[Chosen]) -> None:
        """Undo one `admitted`: the request waits again."""
        with self._lock:
            for residency, modules in zip(residencies, chosen, strict=True):
                self._residents.leave(residency, modules)
                residency.running -= 1
            self._residents.begin_step()

    def check_room(self, wanted: Sequence[Residency]) -> None:
        """AdapterTooLarge if these can never be in memory together."""
        names = ", ".join(repr(r.name) for r in wanted)
        self._residents.check_room(wanted, f"adapters {names} together need")

    def check_beside(self, wanted: Sequence[Residency], kv: int) -> None:
        """InvalidRequest if they and so many bytes of keys and values are never there at once."""
        self._residents.check_beside(wanted, kv)

    def check_integrity(self) -> None:
        """Raise if a slot, a byte or a request is counted wrongly."""
        with self._lock:
            self._residents.check_integrity()
            for r in self._registry.all():
                if r.ready != (r.prepared is not None) or (r.views and not r.ready):
                    raise AssertionError(f"{r.name!r} is half in memory")
                if (r.state is AdapterState.READY) > r.ready:
                    raise AssertionError(f"{r.name!r} is said to be in memory, but is not")
                if not 0 <= r.running <= r.in_flight or (r.running and not r.ready):
                    raise AssertionError(f"{r.name!r}: {r.running} of {r.in_flight} run")
                if (r.unloading is not None) != (r in self._leaving):
                    raise AssertionError(f"{r.name!r} is forgotten by its unload")

    # Inside:

    def _reload(self, residency: Residency, urgency: Urgency) -> None:
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

    def _compare(
        self,
        known: Residency,
        uri: str,
        options: LoadOptions,
        pinned: bool,
        register_only: bool,
        done: Future[AdapterInfo],
    ) -> None:
        """Is what `uri` holds what `known` is?"""

        def join(digest: str) -> None:
            with self._lock:
                self._join(known, uri, digest, pinned, register_only, done)

        self._loader.digest(uri, options, join, done)

    def _join(
        self,
        known: Residency,
        uri: str,
        digest: str,
        pinned: bool,
        register_only: bool,
        done: Future[AdapterInfo],
    ) -> None:
        """The same content under the same name: its load is this one's too."""
        name = known.name
        if known.loading and not known.digest:  # the first load says what the name stands for
            first: Future[AdapterInfo] = self._registry.promise()
            known.waiting_for_check.append(first)

            def again(_: Future[AdapterInfo]) -> None:
                with self._lock:
                    if not self._registry.closed:  # which fails what was promised
                        try:
                            self._join(known, uri, digest, pinned, register_only, done)
                        except RequestError as error:
                            done.set_exception(error)

            first.add_done_callback(again)
            return
        if known.state is AdapterState.FAILED:
            raise AdapterUnavailable(f"adapter {name!r} could not be loaded: {known.error}")
        if known.unloading is not None:
            raise AdapterBusy(f"adapter {name!r} was unloaded meanwhile: load it again")
        known.digest = known.digest or digest
        if digest != known.digest:
            raise AdapterConflict(
                f"adapter {name!r} is registered with digest {known.digest[:16]}; "
                f"{uri} has digest {digest[:16]}: unload the name first, or choose another",
                field="name",
            )
        known.pinned = known.pinned or pinned
        if known.ready or (register_only and not known.loading):
            done.set_result(known.info())
            return
        known.waiting(register_only).append(done)
        if not known.loading:
            self._reload(known, Urgency.ASKED)

    def _publish_one(
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
        self._coming.append((arrival, parcel))
        return True

    def _land(self) -> bool:
        """Publish the first that the courier has brought. -> whether there was one."""
        pair = next((pair for pair in self._coming if pair[1].arrived), None)
        if pair is None:
            return False
        arrival, parcel = pair
        self._coming.remove(pair)
        parcel.publish()
        self._put_in(arrival, booked=True)
        parcel.finish()
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
            self._reload(residency, Urgency.ASKED)

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

    def _evicting(self, residency: Residency) -> None:
        """It leaves the device: keep it beside, if that is worth it."""
        if self._host_tier is not None and residency.unloading is None:
            kept = Arrival(
                residency,
                residency.load_seconds,
                residency.structure,
                residency.prepared,
                residency.nbytes,
                cached=residency.cached,
            )
            self._host_tier.keep(
                residency,
                kept,
                residency.nbytes,
                uses=residency.uses,
                seconds=residency.load_seconds,
            )

    def _evicted(self, residency: Residency) -> None:
        self._observer.on_adapter_evicted(residency.name)
        residency.shrink()
        if residency.state is AdapterState.READY:
            self._registry.change(residency, AdapterState.REGISTERED)

    def _finish_unload(self, residency: Residency) -> None:
        freed = self._residents.take_out(residency) if residency.ready else 0
        self._leaving.remove(residency)
        if self._host_tier is not None:
            self._host_tier.forget(residency)
        residency.own_text = None
        self._registry.forget(residency.name)
        self._observer.on_adapter_unloaded(residency.name)
        self._registry.change(residency, AdapterState.UNLOADED)
        assert residency.unloading is not None
        residency.unloading.set_result(freed)
