"""What the server did in the last minute, as a message."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from deltaserve.server.recent import Durations, Quantiles, Recent, Second, Traffic, quantiles, total
from deltaserve.v1 import route_pb2, server_pb2

if TYPE_CHECKING:
    from deltaserve.server.engine.stats import EngineStats

MOST_MODELS = 100
_JOINTS = re.compile(r"[+|]")
"""Between the names in a label."""


def statistics(
    recent: Recent, now: EngineStats, history: int, sees: Callable[[str], bool]
) -> server_pb2.GetStatsResponse:
    """now: of the engine. history: seconds. sees: whether the caller may know of an adapter; what
    it may not is part of the sums alone."""
    window, offset = recent.last(), time.time() - time.monotonic()
    models = _models(window)
    everything = total(models.values())
    known = {label: m for label, m in models.items() if all(map(sees, _JOINTS.split(label)))}
    most = sorted(known.items(), key=lambda m: (-m[1].completion_tokens, m[0]))[:MOST_MODELS]
    use = now.memory_by_use
    return server_pb2.GetStatsResponse(
        time=_timestamp(time.time()),
        window_seconds=recent.window,
        prompt_tokens=everything.prompt_tokens,
        completion_tokens=everything.completion_tokens,
        requests=everything.requests,
        shed_requests=sum(s.shed for s in window),
        first_token_seconds=_quantiles([s.first_token for s in window]),
        inter_token_seconds=_quantiles([s.inter_token for s in window]),
        models=[
            server_pb2.ModelTraffic(
                model=label,
                requests=m.requests,
                prompt_tokens=m.prompt_tokens,
                completion_tokens=m.completion_tokens,
            )
            for label, m in most
        ],
        load=load(now),
        memory=server_pb2.MemoryUse(
            kv_used_bytes=max(0, use["kv_used"]),
            kv_idle_bytes=max(0, use["kv_idle"]),
            kv_empty_bytes=max(0, use["kv_empty"]),
            adapter_bytes=max(0, use["adapters"]),
            free_bytes=max(0, use["free"]),
        ),
        history=[_point(s, offset) for s in recent.history(history)],
    )


def load(now: EngineStats) -> server_pb2.Load:
    """What runs now."""
    return server_pb2.Load(
        running_requests=now.running,
        waiting_requests=now.waiting,
        kv_blocks_total=now.kv_blocks_total,
        kv_blocks_used=now.kv_blocks_used,
        kv_block_size=now.kv_block_size,
        adapter_bytes=now.adapter_bytes,
        kv_bytes=now.kv_bytes,
        kv_blocks_idle=now.kv_blocks_idle,
    )


def _models(window: list[Second]) -> dict[str, Traffic]:
    parts: dict[str, list[Traffic]] = defaultdict(list)
    for second in window:
        for label, traffic in second.models.copy().items():
            parts[label].append(traffic)
    return {label: total(each) for label, each in parts.items()}


def _point(second: Second, offset: float) -> server_pb2.StatsPoint:
    """offset: from the monotonic clock to the time of day, in seconds."""
    traffic = second.total()
    return server_pb2.StatsPoint(
        time=_timestamp(second.at + offset),
        prompt_tokens=traffic.prompt_tokens,
        completion_tokens=traffic.completion_tokens,
        requests=traffic.requests,
        first_token_seconds=_quantiles([second.first_token]),
        inter_token_seconds=_quantiles([second.inter_token]),
    )


def _quantiles(each: list[Durations]) -> route_pb2.Quantiles | None:
    found: Quantiles | None = quantiles(each)
    if found is None:
        return None
    return route_pb2.Quantiles(p50=found.p50, p90=found.p90, p99=found.p99, mean=found.mean)


def _timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
