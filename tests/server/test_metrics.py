"""What is documented is scraped, and names cannot make the series grow without bound."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import dashboards
from fake_engine import FakeEngine
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from served import served

from deltaserve.clients import AsyncClient
from deltaserve.server.engine.core import AdapterState, FinishReason, Timings, Usage
from deltaserve.server.engine.observer import Observer
from deltaserve.server.engine.stats import EngineStats
from deltaserve.server.engine_metrics import EngineCollector
from deltaserve.server.metrics import MAX_ADAPTERS, MAX_ARMS, Metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def exercise(observer: Observer, adapter: str) -> None:
    """Everything that the engine tells of one request."""
    observer.on_first_token(adapter, 0.1)
    observer.on_inter_token(adapter, 0.01)
    observer.on_tokens(adapter, 7, 1)
    observer.on_tokens(adapter, 0, 1)
    timings = Timings(queue=0.02, adapter_load=0.0, time_to_first_token=0.1, total=0.5)
    observer.on_finished(adapter, FinishReason.STOP, Usage(7, 2, 3, 0, 5, 4), timings)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = generate_latest(metrics.registry).decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if not s.name.endswith("_created")
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def full() -> Metrics:
    metrics = Metrics()
    metrics.registry.register(EngineCollector(FakeEngine()))  # type: ignore[arg-type]
    metrics.on_adapter_load("a", 0.3)
    metrics.on_load_stage("pack", 0.25)
    metrics.on_cache(True)
    metrics.on_adapter_evicted("a")
    exercise(metrics, "a")
    metrics.on_shed("queue_full")
    metrics.on_route("r", "x", "answered", 0.5)
    metrics.on_rpc("deltaserve.v1.AdapterService/GetAdapter", "OK")
    metrics.on_http("/v1/models", 200)
    return metrics


def test_the_documentation_is_the_scrape() -> None:
    documented = set(re.findall(r"^\| `([a-z_:]+)`", DOCS.read_text(), re.M))
    names = {name for name, _ in samples(full())}
    scraped = {
        re.sub(r"_(bucket|count|sum)$", "", n) for n in names if not n.startswith("process_")
    }
    assert documented == scraped


def test_labels_are_those_documented() -> None:
    rows = re.findall(
        r"^\| `([a-z_:]+)` (?:\| (?:counter|gauge|histogram) )?\| ([^|]*)\|", DOCS.read_text(), re.M
    )
    documented = {name: {x.strip() for x in labels.split(",")} - {""} for name, labels in rows}
    assert len(documented) > 20
    for (name, labels), _ in samples(full()).items():
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        if family in documented:
            assert {k for k, _ in labels} - {"le"} == documented[family], name


def test_dashboard_and_alerts_ask_for_labels_that_there_are() -> None:
    known: dict[str, set[str]] = {"up": set()}
    for (name, labels), _ in samples(full()).items():
        known.setdefault(name, set()).update(k for k, _ in labels)
    asked = dashboards.expressions()
    assert len(asked) > 40
    for expression in asked:
        for name, label in dashboards.selected(expression):
            assert label in known[name] | dashboards.ADDED, expression
        found = set().union(*(known[name] for name in dashboards.names(expression)))
        assert dashboards.grouped(expression) <= found | dashboards.ADDED, expression


def test_what_is_counted() -> None:
    metrics = full()
    assert value(metrics, "deltaserve_requests_total", adapter="a", reason="stop") == 1
    assert value(metrics, "deltaserve_prompt_tokens_total", adapter="a") == 7
    assert value(metrics, "deltaserve_completion_tokens_total", adapter="a") == 2
    assert value(metrics, "deltaserve_cached_prompt_tokens_total", adapter="a") == 3
    assert value(metrics, "deltaserve_drafted_tokens_total", adapter="a") == 5
    assert value(metrics, "deltaserve_accepted_tokens_total", adapter="a") == 4
    assert value(metrics, "deltaserve_time_to_first_token_seconds_sum", adapter="a") == 0.1
    assert value(metrics, "deltaserve_queue_seconds_sum", adapter="a") == 0.02
    assert value(metrics, "deltaserve_adapter_load_seconds_count") == 1
    assert value(metrics, "deltaserve_adapter_evictions_total", adapter="a") == 1
    assert value(metrics, "deltaserve_adapter_load_stage_seconds_sum", stage="pack") == 0.25
    assert value(metrics, "deltaserve_adapter_cache_lookups_total", result="hit") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="fake-base") == 0.4


def test_ten_thousand_names_leave_the_series_bounded() -> None:
    metrics = Metrics()
    for i in range(MAX_ADAPTERS + 1):
        metrics.on_adapter_load(f"a{i}", 0.1)
        exercise(metrics, f"a{i}")
    before = len(samples(metrics))
    for i in range(10_000):
        exercise(metrics, f"random{i}")
        exercise(metrics, f"x{i}+y{i}")
    after = len(samples(metrics))
    assert after - before <= len([k for k in samples(metrics) if ("adapter", "_mixed") in k[1]])
    assert value(metrics, "deltaserve_requests_total", adapter="_other", reason="stop") == 10_001
    assert value(metrics, "deltaserve_requests_total", adapter="_mixed", reason="stop") == 10_000


def test_arms_are_bounded_and_go_with_their_route() -> None:
    metrics = Metrics()
    before = set(samples(metrics))
    for i in range(MAX_ARMS + 10):
        metrics.on_route(f"r{i}", "x", "error", 1.0)
        metrics.on_route(f"r{i}", "x", "answered", 0.5)
    assert (
        value(metrics, "deltaserve_route_requests_total", route="r7", arm="x", ended="error") == 1
    )
    other = {"route": "_other", "arm": "_other"}
    assert value(metrics, "deltaserve_route_requests_total", **other, ended="answered") == 10
    assert value(metrics, "deltaserve_route_request_seconds_sum", **other) == 5
    for i in range(MAX_ARMS + 10):
        metrics.on_route_gone(f"r{i}")
    metrics.on_route_gone("_other")
    assert set(samples(metrics)) == before


def test_unloading_removes_the_series_and_makes_room() -> None:
    metrics = Metrics()
    exercise(metrics, "")
    before = set(samples(metrics))
    for i in range(3 * MAX_ADAPTERS):
        metrics.on_adapter_load(f"a{i}", 0.1)
        exercise(metrics, f"a{i}")
        metrics.on_adapter_evicted(f"a{i}")
        metrics.on_adapter_unloaded(f"a{i}")
    assert set(samples(metrics)) == before
    metrics.on_adapter_unloaded("never heard of")


def test_lora_requests_info_is_one_series_a_scrape() -> None:
    engine = FakeEngine()
    engine.adapters.load("a", "/a").result()
    metrics = Metrics()
    metrics.registry.register(EngineCollector(engine))  # type: ignore[arg-type]
    for running in (("a", "b"), ("c",), ()):
        engine.stats = lambda r=running: EngineStats(  # type: ignore[method-assign,misc]
            running_adapters=r,
            waiting_adapters=("w",),
            adapter_bytes_host=1000,
            adapter_bytes_budget=5500,
        )
        found = [k for k in samples(metrics) if k[0] == "vllm:lora_requests_info"]
        labels = {
            "max_lora": "5",  # of 1000 bytes each in a budget of 5500
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": "w",
        }
        assert [dict(labels) for _, labels in found] == [labels]
        assert abs(value(metrics, found[0][0], **labels) - time.time()) < 5


def test_adapters_are_counted_by_state() -> None:
    engine = FakeEngine()
    engine.adapters.list = lambda: [  # type: ignore[method-assign]
        SimpleNamespace(state=s, resident_bytes=0)
        for s in (AdapterState.READY, AdapterState.READY, AdapterState.FAILED)
    ]
    metrics = Metrics()
    metrics.registry.register(EngineCollector(engine))  # type: ignore[arg-type]
    assert value(metrics, "deltaserve_adapters", state="ready") == 2
    assert value(metrics, "deltaserve_adapters", state="failed") == 1
    assert value(metrics, "deltaserve_adapters", state="loading") == 0


async def test_calls_are_counted_by_code() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        await client.generate("x", max_tokens=2)
        await client.server_info()
        for _ in range(3):
            try:
                await client.get_adapter("nobody")
            except Exception as error:
                assert "nobody" in str(error)

    def calls(method: str, code: str) -> float:
        path = f"deltaserve.v1.{method}"
        return value(s.metrics, "deltaserve_rpcs_total", method=path, code=code)

    assert calls("AdapterService/GetAdapter", "NOT_FOUND") == 3
    assert calls("GenerationService/Generate", "OK") == 1
