"""Pieces of streams: our services' messages -> OpenAI's chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deltaserve.server.http import answers, logprobs
from deltaserve.server.http.logprobs import Shown
from deltaserve.v1 import generation_pb2 as pb


class Pieces:
    """Of one answer. n: choices of each prompt. usage: every chunk has the field, and the last one
    holds it and no choice."""

    def __init__(self, id: str, model: str, n: int, *, chat: bool, usage: bool) -> None:
        self._id = id
        self._model = model
        self._n = n
        self._chat = chat
        self._usage = usage
        self._opened: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._prompts: dict[int, pb.Usage] = {}
        self._fingerprint: str | None = None

    def of(
        self, prompt: int, message: pb.GenerateStreamResponse, shown: Shown
    ) -> Iterator[dict[str, Any]]:
        """The chunks of one message. prompt: the number of the prompt that it continues."""
        extra: dict[str, Any] = {}
        if message.HasField("start"):
            extra = answers.served_by(message.start.served_by)
            self._fingerprint = extra["system_fingerprint"]
        finishes = {finish.index: finish for finish in message.finishes}
        for delta in message.deltas:
            index = prompt * self._n + delta.index
            finish = finishes.get(delta.index)
            if finish is not None:
                self._count(prompt, finish.usage)
            for choice in self._choices(index, delta, finish, shown):
                yield self._chunk([choice]) | extra
                extra = {}

    def last(self) -> dict[str, Any] | None:
        """The chunk with the usage, if it was asked for."""
        if not self._usage:
            return None
        return self._chunk([]) | {"usage": answers.usage(self._prompts.values())}

    def _choices(
        self, index: int, delta: pb.StreamDelta, finish: pb.StreamFinish | None, shown: Shown
    ) -> Iterator[dict[str, Any]]:
        made: dict[str, Any] = {"index": index}
        if self._chat:
            if index not in self._opened:
                self._opened.add(index)
                yield {**made, "delta": {"role": "assistant", "content": ""}, **_OPEN}
            made["delta"] = {"content": delta.text} if delta.text else {}
        else:
            made["text"] = delta.text
        made |= {**_OPEN, **answers.extras(delta)}
        if delta.logprobs:
            made["logprobs"] = self._logprobs(index, delta, shown)
        if finish is not None:
            made |= answers.end(finish)
        elif not (delta.text or delta.token_ids):
            return
        yield made

    def _logprobs(self, index: int, delta: pb.StreamDelta, shown: Shown) -> dict[str, Any]:
        if self._chat:
            return logprobs.chat(delta.logprobs, shown)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(shown(p.token_id)) for p in delta.logprobs)
        return logprobs.legacy(delta.logprobs, shown, offset)

    def _count(self, prompt: int, used: pb.Usage) -> None:
        """The prompt of several choices is counted once."""
        total = self._prompts.get(prompt)
        if total is None:
            self._prompts[prompt] = pb.Usage()
            self._prompts[prompt].CopyFrom(used)
            return
        for field in ("completion_tokens", "drafted_tokens", "accepted_tokens"):
            setattr(total, field, getattr(total, field) + getattr(used, field))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        made = answers.head(kind, self._id, self._model)
        made |= {"system_fingerprint": self._fingerprint, "choices": choices}
        return made | ({"usage": None} if self._usage else {})


_OPEN = {"logprobs": None, "finish_reason": None}
