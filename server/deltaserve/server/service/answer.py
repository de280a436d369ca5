"""What the engine gives -> messages."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from deltaserve.server.engine.core import (
    AdapterInfo,
    AdapterState,
    FinishReason,
    Output,
    ServedAdapter,
    Tier,
    Timings,
    TokenDisagreement,
    TokenLogprob,
    Usage,
)
from deltaserve.server.engine.stats import EngineInfo
from deltaserve.v1 import adapter_pb2, generation_pb2

_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEAD_END: generation_pb2.FINISH_REASON_DEAD_END,
    FinishReason.ERROR: generation_pb2.FINISH_REASON_UNSPECIFIED,
}
_STATES: dict[AdapterState, Any] = {
    state: adapter_pb2.AdapterState.Value(f"ADAPTER_STATE_{state.name}") for state in AdapterState
}
_TIERS: dict[Tier, Any] = {
    tier: adapter_pb2.AdapterTier.Value(f"ADAPTER_TIER_{tier.name}") for tier in Tier
}


def logprob(entry: TokenLogprob) -> generation_pb2.TokenLogprob:
    """One place."""
    top = [generation_pb2.TopLogprob(token_id=i, logprob=p) for i, p in entry.top]
    value = None if math.isnan(entry.logprob) else entry.logprob
    return generation_pb2.TokenLogprob(
        token_id=entry.token_id, logprob=value, top=top, rank=entry.rank
    )


def usage(entries: Iterable[Usage], *, one_prompt: bool = False) -> generation_pb2.Usage:
    """The sum. one_prompt: they are choices of one prompt, which is counted once."""
    all_of = list(entries)
    prompts = all_of[:1] if one_prompt else all_of
    return generation_pb2.Usage(
        prompt_tokens=sum(u.prompt_tokens for u in prompts),
        completion_tokens=sum(u.completion_tokens for u in all_of),
        cached_tokens=sum(u.cached_tokens for u in prompts),
        prefix_tokens=sum(u.prefix_tokens for u in prompts),
        drafted_tokens=sum(u.drafted_tokens for u in all_of),
        accepted_tokens=sum(u.accepted_tokens for u in all_of),
    )


def timings(entries: Iterable[Timings]) -> generation_pb2.Timings:
    """The longest of each."""
    all_of = list(entries)
    return generation_pb2.Timings(
        queue_seconds=max(t.queue for t in all_of),
        adapter_load_seconds=max(t.adapter_load for t in all_of),
        time_to_first_token_seconds=max(t.time_to_first_token for t in all_of),
        total_seconds=max(t.total for t in all_of),
    )


def served_by(output: Output, info: EngineInfo) -> generation_pb2.ServedBy:
    """The base and the adapters, or the members of a combination."""
    return generation_pb2.ServedBy(
        base=info.base,
        base_fingerprint=info.held_fingerprint,
        adapters=_served(output.served_by or ()),
        members=[
            generation_pb2.ServedMember(adapters=_served(m.adapters), weight=m.weight)
            for m in output.members
        ],
    )


def _served(adapters: Sequence[ServedAdapter]) -> list[generation_pb2.ServedAdapter]:
    return [
        generation_pb2.ServedAdapter(
            name=a.name, digest=a.digest, strength=a.strength, modules=a.modules, patch=a.patch
        )
        for a in adapters
    ]


def _weight_changes(outputs: Sequence[Output]) -> list[generation_pb2.WeightChange]:
    found, at = [], 0
    for output in outputs:
        if output.weights:
            found.append(generation_pb2.WeightChange(token=at, weights=output.weights))
        at += len(output.token_ids)
    return found


def _disagreements(
    entries: Iterable[TokenDisagreement],
) -> list[generation_pb2.TokenDisagreement]:
    return [
        generation_pb2.TokenDisagreement(divergence=d.divergence, logprobs=d.logprobs)
        for d in entries
    ]


def piece(
    outputs: Sequence[Output], indices: Mapping[str, int]
) -> generation_pb2.GenerateStreamResponse:
    """Of a stream. indices: of the choices, by the engine's ids of their requests."""
    by_choice: dict[int, list[Output]] = defaultdict(list)
    for output in outputs:
        by_choice[indices[output.request_id]].append(output)
    return generation_pb2.GenerateStreamResponse(
        deltas=[delta(i, found) for i, found in sorted(by_choice.items())],
        finishes=[
            finish(i, found[-1])
            for i, found in sorted(by_choice.items())
            if found[-1].finish_reason is not None
        ],
    )


def delta(index: int, outputs: Sequence[Output]) -> generation_pb2.StreamDelta:
    """Neighbouring outputs of one choice as one piece."""
    return generation_pb2.StreamDelta(
        index=index,
        text="".join(o.text for o in outputs),
        token_ids=[i for o in outputs for i in o.token_ids],
        logprobs=[logprob(p) for o in outputs for p in o.logprobs],
        disagreements=_disagreements(d for o in outputs for d in o.disagreements),
        weight_changes=_weight_changes(outputs),
    )


def finish(index: int, last: Output) -> generation_pb2.StreamFinish:
    """The end of one choice."""
    assert last.finish_reason is not None
    return generation_pb2.StreamFinish(
        index=index,
        finish_reason=_REASONS[last.finish_reason],
        stop_reason=last.stop_reason,
        usage=usage([last.usage]) if last.usage is not None else None,
        timings=timings([last.timings]) if last.timings is not None else None,
    )


def choice(index: int, outputs: Sequence[Output]) -> generation_pb2.Choice:
    """All outputs of one choice."""
    whole, last = delta(index, outputs), outputs[-1]
    assert last.finish_reason is not None
    return generation_pb2.Choice(
        index=index,
        text=whole.text,
        token_ids=whole.token_ids,
        logprobs=whole.logprobs,
        finish_reason=_REASONS[last.finish_reason],
        stop_reason=last.stop_reason,
        disagreements=whole.disagreements,
        weight_changes=whole.weight_changes,
    )


def score(last: Output) -> generation_pb2.ContinuationScore:
    """From an output with the log-probabilities of prompt tokens."""
    tokens = last.prompt_logprobs
    return generation_pb2.ContinuationScore(
        logprob=sum(t.logprob for t in tokens),
        tokens=[logprob(t) for t in tokens],
        greedy=all(t.top and t.top[0][0] == t.token_id for t in tokens),
        disagreements=_disagreements(last.prompt_disagreements),
    )


def adapter(info: AdapterInfo) -> adapter_pb2.Adapter:
    """One adapter."""
    return adapter_pb2.Adapter(
        name=info.name,
        digest=info.digest,
        uri=info.uri,
        state=_STATES[info.state],
        tier=_TIERS[info.tier],
        format=info.format,
        primitives=info.primitives,
        resident_bytes=info.resident_bytes,
        source_bytes=info.source_bytes,
        pinned=info.pinned,
        in_flight=info.in_flight,
        loads=info.loads,
        last_used_time=_timestamp(info.last_used),
        loaded_time=_timestamp(info.loaded_at),
        load_duration=_duration(info.load_seconds),
        error=info.error,
        notes=info.notes,
        parent=info.parent,
        patch=info.patch,
        own_tokenizer=info.own_tokenizer,
    )


def _timestamp(seconds: float) -> Timestamp | None:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9)) if seconds else None


def _duration(seconds: float) -> Duration | None:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9)) if seconds else None
