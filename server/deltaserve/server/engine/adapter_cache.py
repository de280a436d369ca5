"""AdapterCache: every registered adapter, and which of them are in memory.

Names are registered from any thread. Reading, checking, lowering and packing run on loader
threads; only the engine thread publishes a loaded adapter to the model or takes it out, between
two steps, so a step always sees whole adapters.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import AdapterError
from deltaserve.kernels.primitives import Prefix
from deltaserve.server.engine.core import AdapterInfo, AdapterRef, AdapterState, Tier
from deltaserve.server.errors import (
    AdapterConflict,
    AdapterUnavailable,
    AdapterUnknown,
    RequestError,
    ShuttingDown,
)

log = logging.getLogger(__name__)


class Prepared(Protocol):
    """An adapter packed for serving."""

    @property
    def nbytes(self) -> int: ...
    @property
    def prefix(self) -> Prefix | None: ...


class Host(Protocol):
    """What holds the published adapters: the model."""

    def prepare(self, adapter: Adapter) -> Any: ...
    def install(self, slot: int, prepared: Any) -> None: ...
    def remove(self, slot: int) -> None: ...


class Observer(Protocol):
    """Told of loads and evictions, for the metrics."""

    def on_adapter_load(self, name: str, seconds: float) -> None: ...
    def on_adapter_evicted(self, name: str) -> None: ...
    def on_adapter_unloaded(self, name: str) -> None: ...


@dataclass(eq=False)
class Residency:
    """One registered adapter. in_flight counts the requests that name it and are not done,
    running those of them that hold cache blocks: it cannot be evicted under those."""

    name: str
    uri: str
    pinned: bool = False
    digest: str = ""
    state: AdapterState = AdapterState.LOADING
    structure: Adapter | None = None  # without content
    prefix: Prefix | None = None
    slot: int = 0
    nbytes: int = 0
    in_flight: int = 0
    running: int = 0
    loads: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0
    load_seconds: float = 0.0
    error: str = ""
    format: str = ""
    primitives: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source_bytes: int = 0
    waiting_for_load: list[Future[AdapterInfo]] | None = None
    unloading: Future[int] | None = None

    @property
    def ready(self) -> bool:
        return self.slot > 0

    def info(self) -> AdapterInfo:
        return AdapterInfo(
            name=self.name,
            digest=self.digest,
            uri=self.uri,
            state=self.state,
            tier=Tier.HOST if self.ready else Tier.DISK,
            format=self.format,
            primitives=self.primitives,
            resident_bytes=self.nbytes if self.ready else 0,
            source_bytes=self.source_bytes,
            pinned=self.pinned,
            in_flight=self.in_flight,
            loads=self.loads,
            last_used=self.last_used,
            loaded_at=self.loaded_at,
            load_seconds=self.load_seconds,
            error=self.error,
            notes=self.notes,
        )


Infos: TypeAlias = list[AdapterInfo]
Residencies: TypeAlias = list[Residency]


@dataclass(slots=True)
class _Arrival:
    residency: Residency
    seconds: float
    adapter: Adapter | None = None
    prepared: Prepared | None = None
    error: Exception | None = None


class AdapterCache:
    """read: uri -> Adapter, on a loader thread. budget: bytes that resident adapters may take
    together. wake: called from any thread when the engine thread has something to do here."""

    def __init__(
        self,
        host: Host,
        read: Callable[[str], Adapter],
        *,
        budget: int,
        wake: Callable[[], None],
        observer: Observer,
        loaders: int = 1,
    ) -> None:
        self.budget = budget
        self.evictions = 0
        self.loads = 0
        self._host = host
        self._read = read
        self._wake = wake
        self._observer = observer
        self._lock = threading.RLock()
        self._by_name: dict[str, Residency] = {}
        self._arrived: deque[_Arrival] = deque()
        self._loading = 0
        self._loaders = loaders
        self._pool = ThreadPoolExecutor(loaders, thread_name_prefix="deltaserve-loader")
        self._free_slots: list[int] = []
        self._next_slot = 1
        self._watchers: list[Callable[[AdapterInfo], None]] = []
        self._closed = False

    # ------------------------------------------------------------ from any thread

    @property
    def used_bytes(self) -> int:
        return sum(r.nbytes for r in list(self._by_name.values()) if r.ready)

    def load(self, name: str, uri: str, *, pinned: bool = False) -> Future[AdapterInfo]:
        """Register `name` and make it resident. The same content under the same name is fine any
        number of times; other content is an AdapterConflict."""
        done: Future[AdapterInfo] = Future()
        with self._lock:
            if self._closed:
                raise ShuttingDown("the server is shutting down and loads no adapters")
            known = self._by_name.get(name)
            if known is not None and known.state is AdapterState.UNLOADING:
                raise AdapterConflict(
                    f"adapter {name!r} is being unloaded: load it again when that is done",
                    field="name",
                )
            if known is None or known.state is AdapterState.FAILED:
                residency = Residency(name, uri, pinned, waiting_for_load=[done])
                self._by_name[name] = residency
                self._start(residency)
            else:
                known.pinned = known.pinned or pinned
                self._pool.submit(self._compare, known, uri, done)
        return done

    def unload(self, name: str) -> Future[int]:
        """Take no new requests for it, let its running ones finish, free it. -> bytes freed."""
        with self._lock:
            residency = self._find(name)
            if residency.unloading is None:
                if residency.state is AdapterState.LOADING:
                    raise AdapterConflict(
                        f"adapter {name!r} is being loaded: unload it when that is done",
                        field="name",
                    )
                residency.unloading = Future()
                self._change(residency, AdapterState.UNLOADING)
            future = residency.unloading
        self._wake()
        return future

    def get(self, name: str) -> AdapterInfo:
        with self._lock:
            return self._find(name).info()

    def list(self) -> Infos:
        """All registered adapters, by name."""
        with self._lock:
            return [r.info() for _, r in sorted(self._by_name.items())]

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """A pinned adapter is never evicted."""
        with self._lock:
            residency = self._find(name)
            residency.pinned = pinned
            self._notify(residency)
            return residency.info()

    def subscribe(self, callback: Callable[[AdapterInfo], None]) -> Callable[[], None]:
        """Call back at every change of state, from whatever thread makes it; the result ends it."""
        with self._lock:
            self._watchers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._watchers:
                    self._watchers.remove(callback)

        return unsubscribe

    def acquire(self, refs: Iterable[AdapterRef]) -> tuple[Residency, ...]:
        """The adapters of a new request, counted as in flight until `release`."""
        with self._lock:
            found = tuple(self._resolve(ref) for ref in refs)
            for residency in found:
                residency.in_flight += 1
                residency.last_used = time.time()
            return found

    def release(self, residencies: Iterable[Residency], *, running: bool) -> None:
        """The request is done. running: it had been admitted to a batch."""
        with self._lock:
            for residency in residencies:
                residency.in_flight -= 1
                residency.running -= int(running)
                residency.last_used = time.time()
                assert residency.in_flight >= residency.running >= 0

    def close(self) -> None:
        """Take no more loads; fail those that wait."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for residency in self._by_name.values():
                for future in residency.waiting_for_load or []:
                    if not future.done():
                        future.set_exception(ShuttingDown("the server is shutting down"))

    # ------------------------------------------------------------ on the engine thread

    def step(self, waiting: Sequence[Sequence[Residency]]) -> None:
        """Between two steps: publish what arrived, finish unloads, start the loads that waiting
        requests (their adapters, in the order they will be served) need."""
        with self._lock:
            head = next((w for w in waiting if not all(r.ready for r in w)), ())
            for _ in range(len(self._arrived)):
                arrival = self._arrived.popleft()
                if not self._publish(arrival, frozenset(head)):
                    self._arrived.append(arrival)
            for residency in list(self._by_name.values()):
                if residency.unloading is not None and residency.in_flight == 0:
                    self._finish_unload(residency)
            for wanted in waiting:
                for residency in wanted:
                    if (
                        residency.state is AdapterState.REGISTERED
                        and self._loading < self._loaders
                        and self._could_fit(residency, greedy=wanted is head)
                    ):
                        self._change(residency, AdapterState.LOADING)
                        self._start(residency)

    def admitted(self, residencies: Iterable[Residency]) -> None:
        """A request was taken into the batch: its adapters stay."""
        with self._lock:
            for residency in residencies:
                residency.running += 1

    @property
    def pending(self) -> bool:
        """There is something for `step` to do besides waiting requests."""
        return bool(self._arrived) or any(
            r.unloading is not None and r.in_flight == 0 for r in list(self._by_name.values())
        )

    # ------------------------------------------------------------ inside

    def _find(self, name: str) -> Residency:
        residency = self._by_name.get(name)
        if residency is None:
            names = ", ".join(sorted(self._by_name)[:8]) or "none"
            raise AdapterUnknown(
                f"no adapter named {name!r} is registered (registered: {names})", field="model"
            )
        return residency

    def _resolve(self, ref: AdapterRef) -> Residency:
        name, _, digest = ref.name.partition("@")
        residency = self._find(name)
        if residency.state is AdapterState.UNLOADING:
            raise AdapterUnknown(f"adapter {name!r} is being unloaded", field="model")
        if residency.state is AdapterState.FAILED:
            raise AdapterUnavailable(
                f"adapter {name!r} could not be loaded: {residency.error}", field="model"
            )
        if digest and not (residency.digest and residency.digest.startswith(digest)):
            raise AdapterUnknown(
                f"adapter {name!r} has digest {residency.digest[:16] or '(loading)'}, "
                f"not {digest!r}",
                field="model",
            )
        return residency

    def _start(self, residency: Residency) -> None:
        self._loading += 1
        self._notify(residency)
        self._pool.submit(self._load, residency)

    def _load(self, residency: Residency) -> None:
        """On a loader thread."""
        began = time.perf_counter()
        arrival = _Arrival(residency, 0.0)
        try:
            adapter = self._read(residency.uri)
            if residency.digest and adapter.digest != residency.digest:
                raise AdapterConflict(
                    f"{residency.uri} has changed since {residency.name!r} was registered: digest "
                    f"{adapter.digest[:16]}, registered {residency.digest[:16]}",
                    field="uri",
                )
            arrival.prepared = self._host.prepare(adapter)
            arrival.adapter = adapter.without_content()
        except Exception as error:
            if not isinstance(error, AdapterError | RequestError):
                log.exception("loading adapter %r from %s failed", residency.name, residency.uri)
            arrival.error = error
        arrival.seconds = time.perf_counter() - began
        with self._lock:
            self._loading -= 1
            self._arrived.append(arrival)
        self._wake()

    def _compare(self, known: Residency, uri: str, done: Future[AdapterInfo]) -> None:
        """On a loader thread: is what `uri` holds what `known` is?"""
        try:
            digest = self._read(uri).digest
            with self._lock:
                if known.state is AdapterState.LOADING and known.waiting_for_load is not None:
                    known.waiting_for_load.append(done)
                    if not known.digest:
                        known.digest = digest  # the first load must agree with the second
                    return
                if digest != known.digest:
                    raise AdapterConflict(
                        f"adapter {known.name!r} is registered with digest {known.digest[:16]}; "
                        f"{uri} has digest {digest[:16]}: unload the name first, or choose another",
                        field="name",
                    )
                done.set_result(known.info())
        except Exception as error:
            done.set_exception(error)

    def _publish(self, arrival: _Arrival, protected: frozenset[Residency]) -> bool:
        """False if there is no room now. Nothing is evicted unless there will be room."""
        residency = arrival.residency
        if arrival.error is not None:
            self._fail(residency, arrival.error)
            return True
        adapter, prepared = arrival.adapter, arrival.prepared
        assert adapter is not None and prepared is not None
        need = prepared.nbytes
        if need > self.budget:
            message = f"needs {need} bytes, the adapter memory is {self.budget} bytes in all"
            self._fail(residency, AdapterUnavailable(f"adapter {residency.name!r} {message}"))
            return True
        if not self._make_room(need, protected):
            return False
        slot = self._free_slots.pop() if self._free_slots else self._next_slot
        self._next_slot = max(self._next_slot, slot + 1)
        try:
            self._host.install(slot, prepared)
        except Exception as error:  # a bug, but one adapter's: the others are served on
            log.exception("installing adapter %r failed", residency.name)
            self._fail(residency, error)
            return True
        residency.digest, residency.format = adapter.digest, adapter.format
        residency.primitives, residency.notes = adapter.primitives, adapter.notes
        residency.source_bytes, residency.nbytes = adapter.source_bytes, need
        residency.structure, residency.prefix = adapter, prepared.prefix
        residency.slot = slot
        residency.loads += 1
        self.loads += 1
        residency.loaded_at, residency.load_seconds = time.time(), arrival.seconds
        residency.error = ""
        if residency.state is not AdapterState.UNLOADING:
            self._change(residency, AdapterState.READY)
        self._observer.on_adapter_load(residency.name, arrival.seconds)
        for future in residency.waiting_for_load or []:
            future.set_result(residency.info())
        residency.waiting_for_load = None
        return True

    def _fail(self, residency: Residency, error: Exception) -> None:
        residency.error = str(error)
        self._change(residency, AdapterState.FAILED)
        for future in residency.waiting_for_load or []:
            future.set_exception(error)
        residency.waiting_for_load = None
        if not residency.loads:  # it never was an adapter
            self._by_name.pop(residency.name, None)

    def _evictable(self, protected: frozenset[Residency]) -> Residencies:
        """Who could go, first the one least worth keeping."""
        idle = [
            r
            for r in self._by_name.values()
            if r.ready and not r.running and not r.pinned and r not in protected
        ]
        return sorted(idle, key=lambda r: (r.in_flight > 0, r.last_used))

    def _make_room(self, need: int, protected: frozenset[Residency]) -> bool:
        victims = self._evictable(protected)
        if self.used_bytes + need - sum(v.nbytes for v in victims) > self.budget:
            return False
        for victim in victims:
            if self.used_bytes + need <= self.budget:
                break
            self._take_out(victim)
            self.evictions += 1
            self._observer.on_adapter_evicted(victim.name)
            if victim.state is AdapterState.READY:
                self._change(victim, AdapterState.REGISTERED)
        return True

    def _could_fit(self, residency: Residency, *, greedy: bool) -> bool:
        """greedy: even at the cost of adapters that other waiting requests want. The request that
        is served next may; so it is served as soon as running ones make room."""
        victims = [v for v in self._evictable(frozenset((residency,))) if greedy or not v.in_flight]
        room = self.budget - self.used_bytes + sum(v.nbytes for v in victims)
        return residency.nbytes <= room

    def _take_out(self, residency: Residency) -> None:
        self._host.remove(residency.slot)
        self._free_slots.append(residency.slot)
        residency.slot = 0
        residency.structure = residency.prefix = None

    def _finish_unload(self, residency: Residency) -> None:
        freed = residency.nbytes if residency.ready else 0
        if residency.ready:
            self._take_out(residency)
        del self._by_name[residency.name]
        self._observer.on_adapter_unloaded(residency.name)
        self._change(residency, AdapterState.UNLOADED)
        assert residency.unloading is not None
        residency.unloading.set_result(freed)

    def _change(self, residency: Residency, state: AdapterState) -> None:
        residency.state = state
        self._notify(residency)

    def _notify(self, residency: Residency) -> None:
        info = residency.info()
        for watcher in list(self._watchers):
            try:
                watcher(info)
            except Exception:
                log.exception("a watcher of adapters failed")
