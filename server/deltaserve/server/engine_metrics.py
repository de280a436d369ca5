"""EngineCollector: what is read from the engine at each scrape, under our names and the five that
inference gateways know from vLLM (Gateway API Inference Extension, proposal 003)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from deltaserve.server.engine.core import AdapterInfo, AdapterState
from deltaserve.server.engine.stats import EngineStats

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine


class EngineCollector(Collector):
    """One series per name and scrape, whatever the adapters are called: a labelled gauge would
    keep a series for every combination of adapters that ever ran together."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats, adapters = self._engine.stats(), self._engine.adapters.list()
        yield from _ours(stats, adapters)
        yield self._info()
        yield from _gateway(stats, adapters, self._engine.info().base)

    def _info(self) -> Metric:
        info = self._engine.info()
        labels = {
            "version": version("deltaserve"),
            "base": info.base,
            "fingerprint": info.fingerprint,
            "quantization": info.quantization,
            "dtype": info.dtype,
            "device": info.device,
        }
        return _gauge("deltaserve_info", "What is served; always 1", 1, labels)


def _ours(stats: EngineStats, adapters: list[AdapterInfo]) -> Iterator[Metric]:
    for name, text, value in (
        ("running_requests", "Requests in the batch", stats.running),
        ("waiting_requests", "Requests that wait", stats.waiting),
        ("virtual_lag_seconds", "Service between the waiting tenants", stats.virtual_lag),
        ("kv_blocks", "Blocks of the key-value cache", stats.kv_blocks_total),
        ("kv_blocks_used", "Blocks in use", stats.kv_blocks_used),
        ("kv_block_tokens", "Tokens in a block", stats.kv_block_size),
        ("kv_blocks_idle", "Blocks kept in case they are wanted again", stats.kv_blocks_idle),
        ("adapter_budget_bytes", "Most that adapters may take", stats.adapter_bytes_budget),
        ("memory_budget_bytes", "Cache blocks and adapters together", stats.memory_budget),
    ):
        yield _gauge(f"deltaserve_{name}", text, value)
    tiers = GaugeMetricFamily(
        "deltaserve_adapter_bytes", "Bytes that adapters take", labels=["tier"]
    )
    tiers.add_metric(["host"], stats.adapter_bytes_host)
    tiers.add_metric(["device"], stats.adapter_bytes_device)
    yield tiers
    uses = GaugeMetricFamily(
        "deltaserve_memory_bytes", "The memory budget by what it is used for", labels=["use"]
    )
    for use, nbytes in stats.memory_by_use.items():
        uses.add_metric([use], nbytes)
    yield uses
    states = GaugeMetricFamily("deltaserve_adapters", "Registered adapters", labels=["state"])
    found = Counter(a.state for a in adapters)
    for state in AdapterState:
        if state is not AdapterState.UNLOADED:
            states.add_metric([state.value], found[state])
    yield states
    for name, text, value in (
        ("prefix_query_tokens", "Prompt tokens looked up in the cache", stats.prefix_queries),
        ("prefix_hit_tokens", "Prompt tokens found in the cache", stats.prefix_hits),
        ("preemptions", "Requests set back to make room", stats.preemptions),
        ("steps", "Steps of the engine", stats.steps),
    ):
        yield CounterMetricFamily(f"deltaserve_{name}", text, value=value)


def _gateway(stats: EngineStats, adapters: list[AdapterInfo], base: str) -> Iterator[Metric]:
    model = {"model_name": base}
    yield _gauge("vllm:num_requests_running", "Requests in the batch", stats.running, model)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait", stats.waiting, model)
    used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    yield _gauge("vllm:kv_cache_usage_perc", "Key-value cache in use, 0 to 1", used, model)
    cache = {
        "block_size": str(stats.kv_block_size),
        "num_gpu_blocks": str(stats.kv_blocks_total),
        **model,
    }
    yield _gauge("vllm:cache_config_info", "Shape of the key-value cache", 1, cache)
    lora = {
        "max_lora": str(_room(stats, adapters)),
        "running_lora_adapters": ",".join(stats.running_adapters),
        "waiting_lora_adapters": ",".join(stats.waiting_adapters),
    }
    yield _gauge("vllm:lora_requests_info", "Adapters in use; the time", time.time(), lora)


def _room(stats: EngineStats, adapters: list[AdapterInfo]) -> int:
    """Adapters that fit together, which is what routers take `max_lora` for. We have no slots:
    it is the resident ones and as many more of their mean size as the budget has room for."""
    sizes = [a.resident_bytes for a in adapters if a.resident_bytes]
    if not sizes:
        return max(1, len(adapters))
    free = max(0, stats.adapter_bytes_budget - stats.adapter_bytes)
    return len(sizes) + free * len(sizes) // sum(sizes)


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels or {}))
    family.add_metric(list((labels or {}).values()), value)
    return family
