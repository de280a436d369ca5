"""What a server did in its last minute, and how it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.clients.report_types import Quantiles
from deltaserve.v1 import route_pb2, server_pb2


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """model: an adapter's name, several joined by ``+``, or empty for the base."""

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of the last window_seconds; durations in seconds, within 5 %, None without any.
    models: those with the most tokens first. running_requests, waiting_requests: now."""

    window_seconds: float
    prompt_tokens: int
    completion_tokens: int
    requests: int
    shed_requests: int
    first_token_seconds: Quantiles | None
    inter_token_seconds: Quantiles | None
    models: tuple[ModelTraffic, ...]
    running_requests: int
    waiting_requests: int


def stats(m: server_pb2.GetStatsResponse) -> Stats:
    """Of the message."""
    first, inter = (
        _quantiles(getattr(m, name)) if m.HasField(name) else None
        for name in ("first_token_seconds", "inter_token_seconds")
    )
    return Stats(
        window_seconds=m.window_seconds,
        prompt_tokens=m.prompt_tokens,
        completion_tokens=m.completion_tokens,
        requests=m.requests,
        shed_requests=m.shed_requests,
        first_token_seconds=first,
        inter_token_seconds=inter,
        models=tuple(
            ModelTraffic(t.model, t.requests, t.prompt_tokens, t.completion_tokens)
            for t in m.models
        ),
        running_requests=m.load.running_requests,
        waiting_requests=m.load.waiting_requests,
    )


def _quantiles(m: route_pb2.Quantiles) -> Quantiles:
    return Quantiles(m.p50, m.p90, m.p99, m.mean)
