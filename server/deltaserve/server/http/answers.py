"""Responses of our services -> OpenAI's answers, whole and in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import json_format

from deltaserve.server.http import logprobs
from deltaserve.server.http.logprobs import Shown
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
    """What every answer and every piece begins with. kind: OpenAI's name for it."""
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


def completion(
    id: str, model: str, responses: Sequence[pb.GenerateResponse], shown: Shown
) -> dict[str, Any]:
    """One response for each prompt; their choices are numbered one after the other."""
    choices: list[dict[str, Any]] = []
    for response in responses:
        for choice in response.choices:
            made: dict[str, Any] = {
                "index": len(choices),
                "text": choice.text,
                "logprobs": None,
                **_end(choice),
            }
            if choice.logprobs:
                made["logprobs"] = logprobs.legacy(choice.logprobs, shown, 0)
            if response.prompt_logprobs:
                made["prompt_logprobs"] = logprobs.prompt(response.prompt_logprobs, shown)
            choices.append(made | _extras(choice))
    return {
        **head("text_completion", id, model),
        "choices": choices,
        "usage": usage(response.usage for response in responses),
        **served_by(responses[0].served_by),
    }


def chat(id: str, model: str, response: pb.GenerateResponse, shown: Shown) -> dict[str, Any]:
    """Of a chat."""
    choices = []
    for choice in response.choices:
        made: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None,
            **_end(choice),
        }
        if choice.logprobs:
            made["logprobs"] = logprobs.chat(choice.logprobs, shown)
        choices.append(made | _extras(choice))
    answer = {
        **head("chat.completion", id, model),
        "choices": choices,
        "usage": usage([response.usage]),
        **served_by(response.served_by),
    }
    if response.prompt_logprobs:
        answer["prompt_logprobs"] = logprobs.prompt(response.prompt_logprobs, shown)
    return answer


def _end(choice: pb.Choice | pb.StreamFinish) -> dict[str, Any]:
    """finish_reason, and vLLM's stop_reason: the stop string or token that ended it."""
    return {
        "finish_reason": REASONS.get(choice.finish_reason, "error"),
        "stop_reason": choice.stop_reason or None,
    }


def end(finish: pb.StreamFinish) -> dict[str, Any]:
    """Likewise of a stream's choice."""
    return _end(finish)


def _extras(piece: pb.Choice | pb.StreamDelta) -> dict[str, Any]:
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


def extras(piece: pb.StreamDelta) -> dict[str, Any]:
    """Likewise of a stream's piece."""
    return _extras(piece)
