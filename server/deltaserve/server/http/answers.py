"""Responses of our services -> OpenAI's answers, whole and in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from deltaserve.server.http import logprobs
from deltaserve.server.http.logprobs import Shown
from deltaserve.server.http.tools import Demanded
from deltaserve.v1 import generation_pb2 as pb

REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
    pb.FINISH_REASON_DEAD_END: "dead_end",
}
"""Where the text is not complete, as its constraint leaves nothing that may follow, OpenAI has no
word for it."""


def head(kind: str, id: str, model: str) -> dict[str, Any]:
    """What every answer and every piece of one begins with. kind: OpenAI's name for it."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def served_by(served: pb.ServedBy) -> dict[str, Any]:
    """Our own fields: what answered, and the base that it was held as."""
    told = json_format.MessageToDict(
        served, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {"system_fingerprint": fingerprint(served), "served_by": told}


def fingerprint(served: pb.ServedBy) -> str:
    """Of the base as it is held."""
    return f"fp_{served.base_fingerprint[:12]}"


def usage(entries: Iterable[pb.Usage]) -> dict[str, Any]:
    """The sum, as OpenAI tells it."""
    all_of = list(entries)
    prompt = sum(u.prompt_tokens for u in all_of)
    answer = sum(u.completion_tokens for u in all_of)
    accepted = sum(u.accepted_tokens for u in all_of)
    drafted = sum(u.drafted_tokens for u in all_of)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in all_of)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


@dataclass(frozen=True, slots=True)
class Stops:
    """What the request gave to stop at."""

    strings: frozenset[str]
    tokens: frozenset[int]

    def end(self, ended: pb.Choice | pb.StreamFinish) -> dict[str, Any]:
        """finish_reason, and vLLM's stop_reason: the string or the token, null for the end of
        sequence."""
        why: str | int | None = ended.stop_reason or None
        if ended.stop_reason not in self.strings and ended.stop_reason.isdecimal():
            why = int(ended.stop_reason) if int(ended.stop_reason) in self.tokens else None
        return {"finish_reason": REASONS.get(ended.finish_reason, "error"), "stop_reason": why}


def completion(
    id: str,
    model: str,
    responses: Sequence[pb.GenerateResponse],
    stops: Stops,
    words: Sequence[Shown],
) -> dict[str, Any]:
    """One response for each prompt; their choices are numbered one after the other, and tell of
    several prompts which one they answer, as the prompts of a route may have several arms. words:
    of each response."""
    choices: list[dict[str, Any]] = []
    for response, shown in zip(responses, words, strict=True):
        own: dict[str, Any] = {}
        if len(responses) > 1:
            told = served_by(response.served_by)["served_by"]
            own = {"request_id": response.request_id, "served_by": told}
        for choice in response.choices:
            made = {"index": len(choices), "text": choice.text, "logprobs": None}
            if choice.logprobs:
                made["logprobs"] = logprobs.legacy(choice.logprobs, shown, 0)
            if response.prompt_logprobs:
                made["prompt_logprobs"] = logprobs.prompt(response.prompt_logprobs, shown)
            choices.append(made | stops.end(choice) | extras(choice) | own)
    return {
        **head("text_completion", id, model),
        "choices": choices,
        "usage": usage(response.usage for response in responses),
        **served_by(responses[0].served_by),
    }


def chat(
    id: str,
    model: str,
    response: pb.GenerateResponse,
    stops: Stops,
    shown: Shown,
    demanded: Demanded | None,
) -> dict[str, Any]:
    """Of a chat."""
    choices = []
    for choice in response.choices:
        end = stops.end(choice)
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        calls = demanded.calls(choice.text) if demanded is not None else None
        if demanded is not None and calls is not None:
            message |= {"content": None, "tool_calls": calls}
            if end["finish_reason"] == "stop":
                end["finish_reason"] = demanded.finish_reason
        made = {"index": choice.index, "message": message, "logprobs": None}
        if choice.logprobs:
            made["logprobs"] = logprobs.chat(choice.logprobs, shown)
        choices.append(made | end | extras(choice))
    answer = {
        **head("chat.completion", id, model),
        "choices": choices,
        "usage": usage([response.usage]),
        **served_by(response.served_by),
    }
    if response.prompt_logprobs:
        answer["prompt_logprobs"] = logprobs.prompt(response.prompt_logprobs, shown)
    return answer


def extras(piece: pb.Choice | pb.StreamDelta) -> dict[str, Any]:
    """Of combinations."""
    found: dict[str, Any] = {}
    for field in ("disagreements", "weight_changes"):
        entries = getattr(piece, field)
        if entries:
            found[field] = [
                json_format.MessageToDict(
                    entry,
                    preserving_proto_field_name=True,
                    always_print_fields_with_no_presence=True,
                )
                for entry in entries
            ]
    return found
