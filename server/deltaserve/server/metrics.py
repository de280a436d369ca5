"""Metrics: what Prometheus sees. docs/metrics.md lists every name.

The label `adapter` is bounded: the names of registered adapters up to a cap, then ``_other``;
``_base`` for the base alone, ``_mixed`` for several adapters at once, ``_combined`` for the members
of a combination. No adapter can be called so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase

from deltaserve.server.engine.core import FinishReason, Timings, Usage
from deltaserve.server.recent import Recent

MAX_ADAPTERS = 200
MAX_ARMS = 500
BASE, MIXED, COMBINED, OTHER = "_base", "_mixed", "_combined", "_other"
_SPECIAL = (BASE, MIXED, COMBINED, OTHER)

_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
_WAIT_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_LOAD_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(slots=True)
class _Children:
    """The label children of one adapter, looked up once."""

    first_token: Histogram
    inter_token: Histogram
    queue: Histogram
    total: Histogram
    prompt: Counter
    cached: Counter
    completion: Counter
    drafted: Counter
    accepted: Counter
    finished: dict[FinishReason, Counter] = field(default_factory=dict)


class Metrics:
    """The engine's observer. Its methods are called on the engine thread, once or more per step;
    `on_rpc` and `on_http` on the event loop's, `on_shed` on any. recent: what GetStats tells."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.recent = Recent()
        ProcessCollector(registry=self.registry)
        self._lock = threading.Lock()
        self._children: dict[str, _Children] = {}
        self._requests = self._counter("requests", "Requests ended", "adapter", "reason")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens taken in", "adapter")
        self._cached = self._counter(
            "cached_prompt_tokens", "Prompt tokens found in the prefix cache", "adapter"
        )
        self._completion = self._counter("completion_tokens", "Tokens generated", "adapter")
        self._drafted = self._counter(
            "drafted_tokens", "Tokens drafted by prompt lookup", "adapter"
        )
        self._accepted = self._counter(
            "accepted_tokens", "Drafted tokens that came true", "adapter"
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token", _WAIT_SECONDS, "adapter"
        )
        self._inter_token = self._histogram(
            "inter_token_seconds", "Between two tokens of a request", _TOKEN_SECONDS, "adapter"
        )
        self._queue = self._histogram(
            "queue_seconds", "Arrival to first computation", _WAIT_SECONDS, "adapter"
        )
        self._total = self._histogram("request_seconds", "Arrival to end", _WAIT_SECONDS, "adapter")
        self._loads = self._counter("adapter_loads", "Adapters brought into memory", "adapter")
        self._evictions = self._counter(
            "adapter_evictions", "Adapters evicted to make room", "adapter"
        )
        self._load_seconds = self._histogram(
            "adapter_load_seconds", "Reading, checking, lowering one adapter", _LOAD_SECONDS
        )
        self._stage_seconds = self._histogram(
            "adapter_load_stage_seconds", "Stages of loading an adapter", _LOAD_SECONDS, "stage"
        )
        self._cache = self._counter("adapter_cache_lookups", "Loads by adapter cache", "result")
        self._quarantined = self._counter(
            "quarantined_adapters", "Adapters of --state that could not be brought back"
        )
        self._shed = self._counter("shed_requests", "Requests turned away", "reason")
        self._routes = self._counter(
            "route_requests", "Requests of routes ended", "route", "arm", "ended"
        )
        self._route_seconds = self._histogram(
            "route_request_seconds", "Of the answered ones", _WAIT_SECONDS, "route", "arm"
        )
        self._arms: set[tuple[str, str]] = set()
        self._rpcs = self._counter("rpcs", "Calls ended", "method", "code")
        self._http = self._counter("http_requests", "HTTP requests ended", "path", "status")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"deltaserve_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"deltaserve_{name}", text, labels, buckets=buckets, registry=self.registry
        )

    def on_first_token(self, adapter: str, seconds: float) -> None:
        self._of(adapter).first_token.observe(seconds)
        self.recent.first_token(seconds)

    def on_inter_token(self, adapter: str, seconds: float) -> None:
        self._of(adapter).inter_token.observe(seconds)
        self.recent.inter_token(seconds)

    def on_tokens(self, adapter: str, prompt: int, completion: int) -> None:
        children = self._of(adapter)
        if prompt:
            children.prompt.inc(prompt)
        if completion:
            children.completion.inc(completion)
        self.recent.tokens(adapter, prompt, completion)

    def on_finished(
        self, adapter: str, reason: FinishReason, usage: Usage, timings: Timings
    ) -> None:
        children = self._of(adapter)
        finished = children.finished.get(reason)
        if finished is None:
            finished = self._requests.labels(self._label(adapter), reason.value)
            children.finished[reason] = finished
        finished.inc()
        self.recent.finished(adapter)
        children.cached.inc(usage.cached_tokens)
        children.drafted.inc(usage.drafted_tokens)
        children.accepted.inc(usage.accepted_tokens)
        children.queue.observe(timings.queue)
        children.total.observe(timings.total)

    def on_shed(self, reason: str) -> None:
        self._shed.labels(reason).inc()
        self.recent.shed()

    def on_adapter_load(self, name: str, seconds: float) -> None:
        self._of(name)
        self._loads.labels(self._label(name)).inc()
        self._load_seconds.observe(seconds)

    def on_load_stage(self, stage: str, seconds: float) -> None:
        """stage: one of docs/metrics.md's."""
        self._stage_seconds.labels(stage).observe(seconds)

    def on_cache(self, hit: bool) -> None:
        """A load found the adapter lowered on disk, or not."""
        self._cache.labels("hit" if hit else "miss").inc()

    def on_quarantined(self) -> None:
        """An adapter could not be brought back at the start."""
        self._quarantined.inc()

    def on_adapter_evicted(self, name: str) -> None:
        self._evictions.labels(self._label(name)).inc()

    def on_adapter_unloaded(self, name: str) -> None:
        """Forget everything under its name."""
        with self._lock:
            children = self._children.pop(name, None)
        if children is None:
            return
        for metric in (
            self._prompt,
            self._cached,
            self._completion,
            self._drafted,
            self._accepted,
            self._first_token,
            self._inter_token,
            self._queue,
            self._total,
            self._loads,
            self._evictions,
        ):
            _remove(metric, (name,))
        for reason in children.finished:
            _remove(self._requests, (name, reason.value))

    def on_rpc(self, method: str, code: str) -> None:
        """method: ``package.Service/Method``; code: a gRPC status name."""
        self._rpcs.labels(method, code).inc()

    def on_http(self, path: str, status: int) -> None:
        """path: the template of one of our own, such as ``/v1/models/{name}``; status: of HTTP, 499
        if the client went away before there was one."""
        self._http.labels(path, str(status)).inc()

    def on_route(self, route: str, arm: str, ended: str, seconds: float) -> None:
        """A request of a route ended, as `Ended` says, or ``shed`` for a shadow; on the event loop.
        Beyond `MAX_ARMS` pairs of route and arm the rest are counted as ``_other``."""
        pair = route, arm
        if pair not in self._arms and len(self._arms - {(OTHER, OTHER)}) >= MAX_ARMS:
            pair = OTHER, OTHER
        self._arms.add(pair)
        self._routes.labels(*pair, ended).inc()
        if ended == "answered":
            self._route_seconds.labels(*pair).observe(seconds)

    def on_route_gone(self, route: str) -> None:
        """Forget everything under its name."""
        for pair in [pair for pair in self._arms if pair[0] == route]:
            self._arms.discard(pair)
            for ended in ("answered", "error", "refused", "cancelled", "shed"):
                _remove(self._routes, (*pair, ended))
            _remove(self._route_seconds, pair)

    def _label(self, adapter: str) -> str:
        if not adapter:
            return BASE
        if "|" in adapter:
            return COMBINED
        if "+" in adapter:
            return MIXED
        return adapter if adapter in self._children else OTHER

    def _of(self, adapter: str) -> _Children:
        """The children of an adapter; of ``_other`` when there are too many."""
        known = self._children.get(adapter)
        if known is not None:
            return known
        label = self._label(adapter)
        with self._lock:
            named = sum(name not in _SPECIAL for name in self._children)
            if label == OTHER and named < MAX_ADAPTERS:
                label = adapter
            if label not in self._children:
                self._children[label] = self._make(label)
            return self._children[label]

    def _make(self, label: str) -> _Children:
        return _Children(
            first_token=self._first_token.labels(label),
            inter_token=self._inter_token.labels(label),
            queue=self._queue.labels(label),
            total=self._total.labels(label),
            prompt=self._prompt.labels(label),
            cached=self._cached.labels(label),
            completion=self._completion.labels(label),
            drafted=self._drafted.labels(label),
            accepted=self._accepted.labels(label),
        )


def _remove(metric: MetricWrapperBase, labels: Iterable[str]) -> None:
    try:
        metric.remove(*labels)
    except KeyError:  # nothing was counted under it
        return
