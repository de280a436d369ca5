"""AdapterCache: every registered adapter, and which of them are in memory.

Names are registered from any thread. Reading, checking, lowering and packing run on loader
threads; only the engine thread publishes a loaded adapter to the model or takes it out, between
two steps, so a step always sees whole adapters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.kernels.backend import Courier
from deltaserve.server.engine.arrivals import Arrivals
from deltaserve.server.engine.core import AdapterInfo, AdapterRef, AdapterState
from deltaserve.server.engine.discard import Discard
from deltaserve.server.engine.host_tier import HostTier
from deltaserve.server.engine.joins import Joins
from deltaserve.server.engine.loader import Loader
from deltaserve.server.engine.make import Make
from deltaserve.server.engine.masks import Chosen
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.observer import Observer
from deltaserve.server.engine.prefetch import to_load
from deltaserve.server.engine.registry import Infos, Registry, check_free
from deltaserve.server.engine.residency import Arrival, Residency
from deltaserve.server.engine.residents import Host, Residencies, Residents
from deltaserve.server.engine.workers import Urgency
from deltaserve.server.errors import (
    AdapterBusy,
    InvalidRequest,
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
        if host_tier is not None:
            host_tier.gone = _no_more_kept
        self.on_device = courier is not None
        self._leaving: Residencies = []
        self._loader = Loader(self._registry, make, wake, loaders)
        self._arrivals = Arrivals(
            self._registry, self._residents, self._loader, observer, wake, courier, host_tier
        )
        self._joins = Joins(self._registry, self._loader, self._arrivals.reload)

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
    def kept_bytes(self) -> int:
        """Bytes of adapters in host memory that had to leave the device."""
        return 0 if self._host_tier is None else self._host_tier.used

    @property
    def loads(self) -> int:
        return self._arrivals.loads

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
        digest: str = "",
    ) -> Future[AdapterInfo]:
        """Register `name` and make it resident. The same content under the same name is fine any
        number of times; other content is an AdapterConflict. A parent must be registered. patch:
        it will be part of every request, so it is pinned, and stays. register_only: read and check
        it, and load it when a request asks for it; InvalidRequest for one that is pinned. digest:
        what it must have if it is not registered yet, else AdapterConflict."""
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
                residency = Residency(name, uri, options, pinned or patch, patch, digest)
                residency.waiting(register_only).append(done)
                self._registry.add(residency)
                self._loader.start(residency, Urgency.WHENEVER if register_only else Urgency.ASKED)
            else:
                self._joins.compare(known, uri, options, pinned, register_only, done)
        return done

    def quarantine(
        self, name: str, uri: str, options: LoadOptions, digest: str, error: str
    ) -> None:
        """Have it listed as failed for this reason, unless something is registered as that."""
        with self._lock:
            if self._registry.get(name) is None:
                failed = Residency(name, uri, options, digest=digest, error=error)
                self._registry.add(failed)
                self._registry.change(failed, AdapterState.FAILED)

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
            self._arrivals.close()
            self._residents.clear()
        self._discard.close()

    # On the engine thread:

    def step(self, waiting: Sequence[Sequence[Residency]]) -> None:
        """Between two steps: publish what arrived, finish unloads, start the loads that waiting
        requests (their adapters, in the order they will be served) need. One adapter comes or goes
        in a step, as that takes about a millisecond; the others do in the next."""
        with self._lock:
            self._residents.begin_step()
            landed = self._arrivals.land()
            head = next((w for w in waiting if not all(r.ready for r in w)), ())
            changed, more = self._arrivals.publish_one(waiting, head)
            changed = changed or landed
            coming = {arrival.residency for arrival, _ in self._arrivals.coming}
            for residency in [r for r in self._leaving if not r.in_flight and r not in coming]:
                if residency.ready and changed:
                    more = True
                else:
                    changed = changed or residency.ready
                    self._finish_unload(residency)
            for residency in to_load(waiting, head, self._loader, self._residents):
                self._arrivals.reload(residency, Urgency.WANTED)
            self._residents.promise([*head, *(a.residency for a in self._loader.arrived)])
            pumping = self._courier is not None and self._courier.pump()
        if more or pumping:
            self._wake()

    @property
    def expecting(self) -> bool:
        """Something is on its way to the device, and nobody says when it has arrived: `step` asks.
        Engine thread."""
        return bool(self._arrivals.coming)

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
            residency.kept = self._host_tier.keep(
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


def _no_more_kept(residency: Hashable) -> None:
    assert isinstance(residency, Residency)
    residency.kept = False
