"""Log-probabilities in OpenAI's two shapes and in vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from deltaserve.v1 import generation_pb2 as pb

Shown: TypeAlias = Callable[[int], str]
"""A token's id -> how it is told."""

LEAST = -9999.0
"""Told for -infinity, which JSON does not have."""


def legacy(entries: Iterable[pb.TokenLogprob], shown: Shown, offset: int) -> dict[str, Any]:
    """Of completions. offset: characters of the answer before the first."""
    found: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for entry in entries:
        text = shown(entry.token_id)
        known = entry.HasField("logprob")
        found["tokens"].append(text)
        found["token_logprobs"].append(_finite(entry.logprob) if known else None)
        found["top_logprobs"].append(_best(entry, shown) if known else None)
        found["text_offset"].append(offset)
        offset += len(text)
    return found


def chat(entries: Iterable[pb.TokenLogprob], shown: Shown) -> dict[str, Any]:
    """Of chats."""
    content = []
    for entry in entries:
        made = _place(entry.token_id, entry.logprob, shown)
        made["top_logprobs"] = [_place(top.token_id, top.logprob, shown) for top in entry.top]
        content.append(made)
    return {"content": content, "refusal": None}


def prompt(entries: Sequence[pb.TokenLogprob], shown: Shown) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: by token id, the token that is there and the best ones."""
    found: list[dict[str, Any] | None] = []
    for entry in entries:
        if not entry.HasField("logprob"):
            found.append(None)
            continue
        place = {
            str(top.token_id): _ranked(top.token_id, top.logprob, rank, shown)
            for rank, top in enumerate(entry.top, 1)
        }
        own = str(entry.token_id)
        place.setdefault(own, _ranked(entry.token_id, entry.logprob, entry.rank, shown))
        found.append(place)
    return found


def _best(entry: pb.TokenLogprob, shown: Shown) -> dict[str, float]:
    """The best ones and the token that is there; of tokens with one text the more probable."""
    found: dict[str, float] = {}
    for top in entry.top:
        found.setdefault(shown(top.token_id), _finite(top.logprob))
    found.setdefault(shown(entry.token_id), _finite(entry.logprob))
    return found


def _place(token_id: int, logprob: float, shown: Shown) -> dict[str, Any]:
    text = shown(token_id)
    whole = "\ufffd" not in text  # else it is a part of a character, and its bytes are not known
    data = list(text.encode("utf-8", "replace")) if whole else None
    return {"token": text, "logprob": _finite(logprob), "bytes": data}


def _ranked(token_id: int, logprob: float, rank: int, shown: Shown) -> dict[str, Any]:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": shown(token_id)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
