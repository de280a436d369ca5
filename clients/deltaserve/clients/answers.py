"""Response messages -> the types of `types`, the same for both clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from deltaserve.clients import types
from deltaserve.v1 import adapter_pb2, generation_pb2, server_pb2

_REASONS = {
    value: name.removeprefix("FINISH_REASON_").lower()
    for name, value in generation_pb2.FinishReason.items()
}
_STATES = {
    value: name.removeprefix("ADAPTER_STATE_").lower()
    for name, value in adapter_pb2.AdapterState.items()
}
_TIERS = {
    value: name.removeprefix("ADAPTER_TIER_").lower()
    for name, value in adapter_pb2.AdapterTier.items()
}
_ASSIGNMENTS = {
    value: name.removeprefix("ASSIGNMENT_").lower()
    for name, value in generation_pb2.Assignment.items()
}


def _seconds(m: Timestamp | Duration) -> float:
    return m.seconds + m.nanos / 1e9


def usage(m: generation_pb2.Usage) -> types.Usage:
    return types.Usage(
        m.prompt_tokens,
        m.completion_tokens,
        m.cached_tokens,
        m.prefix_tokens,
        m.drafted_tokens,
        m.accepted_tokens,
    )


def timings(m: generation_pb2.Timings) -> types.Timings:
    return types.Timings(
        m.queue_seconds, m.adapter_load_seconds, m.time_to_first_token_seconds, m.total_seconds
    )


def served_by(m: generation_pb2.ServedBy) -> types.ServedBy:
    members = tuple(types.ServedMember(_served(one.adapters), one.weight) for one in m.members)
    assignment = _ASSIGNMENTS.get(m.assignment, "") if m.route else ""
    return types.ServedBy(
        m.base, m.base_fingerprint, _served(m.adapters), members, m.route, m.arm, assignment
    )


def _served(adapters: Iterable[generation_pb2.ServedAdapter]) -> tuple[types.ServedAdapter, ...]:
    return tuple(
        types.ServedAdapter(a.name, a.digest, a.strength, tuple(a.modules), a.patch)
        for a in adapters
    )


def _weight_changes(found: Iterable[generation_pb2.WeightChange]) -> list[types.WeightChange]:
    return [types.WeightChange(c.token, tuple(c.weights)) for c in found]


def _disagreements(
    found: Iterable[generation_pb2.TokenDisagreement],
) -> list[types.TokenDisagreement]:
    return [types.TokenDisagreement(d.divergence, tuple(d.logprobs)) for d in found]


def _chosen(logprobs: Iterable[generation_pb2.TokenLogprob]) -> list[float | None]:
    return [entry.logprob if entry.HasField("logprob") else None for entry in logprobs]


def _top(logprobs: Iterable[generation_pb2.TokenLogprob]) -> list[list[tuple[int, float]]]:
    return [[(t.token_id, t.logprob) for t in entry.top] for entry in logprobs]


def _choice(m: generation_pb2.Choice, with_logprobs: bool) -> types.Choice:
    return types.Choice(
        text=m.text,
        token_ids=list(m.token_ids),
        logprobs=_chosen(m.logprobs) if with_logprobs else None,
        finish_reason=_REASONS.get(m.finish_reason, "unspecified"),
        stop_reason=m.stop_reason,
        top_logprobs=_top(m.logprobs) if with_logprobs else None,
        disagreements=_disagreements(m.disagreements),
        weight_changes=_weight_changes(m.weight_changes),
    )


def generation(m: generation_pb2.GenerateResponse, with_logprobs: bool) -> types.Generation:
    """The whole answer."""
    choices = tuple(_choice(c, with_logprobs) for c in m.choices)
    first = choices[0]
    return types.Generation(
        text=first.text,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        finish_reason=first.finish_reason,
        usage=usage(m.usage),
        served_by=served_by(m.served_by),
        stop_reason=first.stop_reason,
        top_logprobs=first.top_logprobs,
        timings=timings(m.timings),
        request_id=m.request_id,
        choices=choices,
        disagreements=first.disagreements,
        prompt_logprobs=_chosen(m.prompt_logprobs) if m.prompt_logprobs else None,
        prompt_top_logprobs=_top(m.prompt_logprobs) if m.prompt_logprobs else None,
    )


def pieces(m: generation_pb2.GenerateStreamResponse, with_logprobs: bool) -> Iterator[types.Piece]:
    """One per choice that has something new; a message that only starts or ends has one too."""
    ends = {f.index: f for f in m.finishes}
    deltas = {d.index: d for d in m.deltas}
    started = served_by(m.start.served_by) if m.HasField("start") else None
    prompt: Sequence[generation_pb2.TokenLogprob] = m.start.prompt_logprobs
    for index in sorted(ends.keys() | deltas.keys()) or [0]:
        delta = deltas.get(index, generation_pb2.StreamDelta())
        end = ends.get(index)
        logprobs = delta.logprobs if with_logprobs else None
        yield types.Piece(
            text=delta.text,
            token_ids=tuple(delta.token_ids),
            logprobs=None if logprobs is None else tuple(_chosen(logprobs)),
            index=index,
            finish_reason=_REASONS.get(end.finish_reason, "unspecified") if end else None,
            stop_reason=end.stop_reason if end else "",
            usage=usage(end.usage) if end else None,
            timings=timings(end.timings) if end else None,
            served_by=started,
            top_logprobs=None if logprobs is None else tuple(map(tuple, _top(logprobs))),
            request_id=m.start.request_id,
            disagreements=tuple(_disagreements(delta.disagreements)),
            weight_changes=tuple(_weight_changes(delta.weight_changes)),
            prompt_logprobs=tuple(_chosen(prompt)) if prompt else None,
            prompt_top_logprobs=tuple(map(tuple, _top(prompt))) if prompt else None,
        )
        started, prompt = None, ()


def scores(m: generation_pb2.ScoreResponse) -> list[types.ContinuationScore]:
    """In the order of the continuations."""
    return [
        types.ContinuationScore(
            s.logprob,
            [t.token_id for t in s.tokens],
            [t.logprob for t in s.tokens],
            s.greedy,
            _disagreements(s.disagreements),
        )
        for s in m.scores
    ]


def adapter(m: adapter_pb2.Adapter) -> types.Adapter:
    """One adapter."""
    return types.Adapter(
        name=m.name,
        digest=m.digest,
        uri=m.uri,
        state=_STATES.get(m.state, "unspecified"),
        tier=_TIERS.get(m.tier, "unspecified"),
        format=m.format,
        primitives=tuple(m.primitives),
        resident_bytes=m.resident_bytes,
        source_bytes=m.source_bytes,
        pinned=m.pinned,
        in_flight=m.in_flight,
        loads=m.loads,
        last_used=_seconds(m.last_used_time),
        loaded_at=_seconds(m.loaded_time),
        load_seconds=_seconds(m.load_duration),
        error=m.error,
        notes=tuple(m.notes),
        parent=m.parent,
        patch=m.patch,
        own_tokenizer=m.own_tokenizer,
        tenant=m.tenant,
        shared=m.shared,
    )


def change(m: adapter_pb2.WatchAdaptersResponse) -> types.AdapterChange:
    """One message of a watch."""
    return types.AdapterChange(m.snapshot, tuple(adapter(a) for a in m.adapters))


def server_info(m: server_pb2.GetServerInfoResponse) -> types.ServerInfo:
    """The server as it is now."""
    return types.ServerInfo(
        version=m.version,
        base=m.base.name,
        base_names=tuple(m.base.names),
        architecture=m.base.architecture,
        fingerprint=m.base.fingerprint,
        held_fingerprint=m.base.held_fingerprint,
        quantization=m.base.quantization,
        dtype=m.base.dtype,
        max_length=m.base.max_length,
        vocab_size=m.base.vocab_size,
        chat=m.base.chat,
        device=m.device,
        adapter_formats=tuple(m.adapter_formats),
        weights_bytes=m.memory.weights_bytes,
        kv_cache_bytes=m.memory.kv_cache_bytes,
        adapter_budget_bytes=m.memory.adapter_budget_bytes,
        adapter_bytes=m.load.adapter_bytes,
        running_requests=m.load.running_requests,
        waiting_requests=m.load.waiting_requests,
        kv_blocks_total=m.load.kv_blocks_total,
        kv_blocks_used=m.load.kv_blocks_used,
        kv_block_size=m.load.kv_block_size,
        memory_budget_bytes=m.memory.budget_bytes,
        free_bytes=m.memory.free_bytes,
        step_bytes=m.memory.step_bytes,
        kv_token_bytes=m.memory.kv_token_bytes,
        kv_floor_bytes=m.memory.kv_floor_bytes,
        kv_tokens=m.memory.kv_tokens,
        adapter_fits=tuple(
            types.AdapterFit(f.kind, f.bytes, f.count, f.kv_tokens) for f in m.memory.adapters
        ),
        kv_bytes=m.load.kv_bytes,
        kv_blocks_idle=m.load.kv_blocks_idle,
    )
