"""Pieces of streams: our services' messages -> OpenAI's chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

from deltaserve.server.http import answers, logprobs
from deltaserve.server.http.asked import Asked
from deltaserve.server.http.logprobs import Shown
from deltaserve.v1 import generation_pb2 as pb


class Told(Enum):
    """When a stream tells the usage. AT_END: every chunk has the field, and the last one holds it
    and no choice. ALWAYS: every chunk holds what was used until then."""

    NEVER = auto()
    AT_END = auto()
    ALWAYS = auto()


class Pieces:
    """Of a completion."""

    kind = "text_completion"

    def __init__(self, asked: Asked, usage: Told) -> None:
        self._asked = asked
        self._head = answers.head(self.kind, asked.id, asked.model)
        self._told = usage
        self._used: dict[int, pb.Usage] = defaultdict(pb.Usage)
        self._fingerprint: str | None = None
        self._offsets: dict[int, int] = defaultdict(int)
        self._running: dict[int, int] = defaultdict(int)

    def of(
        self, prompt: int, message: pb.GenerateStreamResponse, shown: Shown
    ) -> Iterator[dict[str, Any]]:
        """The chunks of one message. prompt: the number of the prompt that it continues."""
        extra: dict[str, Any] = {}
        if message.HasField("start"):
            extra = answers.served_by(message.start.served_by)
            self._fingerprint = extra["system_fingerprint"]
            self._used[prompt].prompt_tokens = message.start.prompt_tokens
        finishes = {finish.index: finish for finish in message.finishes}
        for delta in message.deltas:
            finish = finishes.get(delta.index)
            index = prompt * self._asked.n + delta.index
            self._count(prompt, index, delta, finish)
            end = {"finish_reason": None} if finish is None else self._asked.stops.end(finish)
            for choice in self._choices(index, delta, end, shown):
                yield self._chunk([{"logprobs": None, **choice}]) | extra
                extra = {}

    def last(self) -> dict[str, Any] | None:
        """The chunk with the usage, if it was asked for."""
        if self._told is Told.NEVER:
            return None
        return self._chunk([]) | {"usage": answers.usage(self._used.values())}

    def _choices(
        self, index: int, delta: pb.StreamDelta, end: dict[str, Any], shown: Shown
    ) -> Iterator[dict[str, Any]]:
        made = {"index": index, "text": delta.text, **end, **answers.extras(delta)}
        if delta.logprobs:
            made["logprobs"] = logprobs.legacy(delta.logprobs, shown, self._offsets[index])
            self._offsets[index] += sum(len(shown(p.token_id)) for p in delta.logprobs)
        yield made

    def _count(
        self, prompt: int, index: int, delta: pb.StreamDelta, finish: pb.StreamFinish | None
    ) -> None:
        """The prompt of several choices is counted once. What a choice's end tells is what holds;
        where the prompt is echoed, its tokens are not told apart before."""
        used = self._used[prompt]
        if finish is not None:
            used.completion_tokens += finish.usage.completion_tokens - self._running[index]
            used.drafted_tokens += finish.usage.drafted_tokens
            used.accepted_tokens += finish.usage.accepted_tokens
            if index == prompt * self._asked.n:
                used.cached_tokens = finish.usage.cached_tokens
        elif not self._asked.messages[prompt].echo:
            self._running[index] += len(delta.token_ids)
            used.completion_tokens += len(delta.token_ids)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        made = {**self._head, "system_fingerprint": self._fingerprint, "choices": choices}
        if self._told is Told.NEVER:
            return made
        always = self._told is Told.ALWAYS
        return made | {"usage": answers.usage(self._used.values()) if always else None}


class ChatPieces(Pieces):
    """Of a chat. Calls that were demanded are told whole, when they are."""

    kind = "chat.completion.chunk"

    def __init__(self, asked: Asked, usage: Told) -> None:
        super().__init__(asked, usage)
        self._opened: set[int] = set()
        self._texts: dict[int, str] = defaultdict(str)

    def _choices(
        self, index: int, delta: pb.StreamDelta, end: dict[str, Any], shown: Shown
    ) -> Iterator[dict[str, Any]]:
        if index not in self._opened:
            self._opened.add(index)
            opening = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": opening, "finish_reason": None}
        told = self._content(index, delta.text, end)
        if not (told or delta.token_ids or end["finish_reason"]):
            return
        made = {"index": index, "delta": told, **end, **answers.extras(delta)}
        if delta.logprobs:
            made["logprobs"] = logprobs.chat(delta.logprobs, shown)
        yield made

    def _content(self, index: int, text: str, end: dict[str, Any]) -> dict[str, Any]:
        demanded = self._asked.demanded
        if demanded is None:
            return {"content": text} if text else {}
        self._texts[index] += text
        if not end["finish_reason"]:
            return {}
        calls = demanded.calls(self._texts[index])
        if calls is None:
            return {"content": self._texts[index]}
        if end["finish_reason"] == "stop":
            end["finish_reason"] = demanded.finish_reason
        return {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}
