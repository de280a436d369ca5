"""Prompts -> token ids, off the event loop where it takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from deltaserve.server.errors import InvalidRequest
from deltaserve.server.rpc import convert
from deltaserve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.text import Text

T = TypeVar("T")

SHORT = 2048
"""Characters that are encoded at once: it takes about as long as handing over to a thread."""
CHARACTERS_PER_TOKEN = 256
"""Text with more characters than this times the model's limit cannot fit: it is not encoded."""


class Encoder:
    """Encodes prompts. max_length: tokens that the model takes."""

    def __init__(self, text: Text, max_length: int, threads: int = 2) -> None:
        self._text = text
        self._max_length = max_length
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="deltaserve-encode")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def prompt(self, request: convert.Targeted | pb.TokenizeRequest) -> list[int]:
        """The token ids of the request's prompt."""
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return await self.text(convert.prompt_text(request.text))
        if kind == "chat":
            return await self._chat(request.chat)
        if kind == "token_ids":
            assert not isinstance(request, pb.TokenizeRequest)
            return self._ids("token_ids.ids", request.token_ids.ids)
        raise InvalidRequest("prompt: there is none; give text, token_ids or chat", field="prompt")

    async def text(self, text: str) -> list[int]:
        """Token ids with the tokenizer's own special tokens."""
        self._check_size("text", len(text))
        return await self._run(len(text), lambda: self._text.encode(text))

    async def _chat(self, chat: pb.ChatPrompt) -> list[int]:
        turns = convert.messages(chat)
        opened = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        size = sum(len(turn["content"]) for turn in turns)
        self._check_size("chat.messages", size)
        try:
            return await self._run(
                size, lambda: self._text.chat(turns, add_generation_prompt=opened)
            )
        except InvalidRequest as error:
            raise convert.in_request(error) from None

    async def continued(self, request: pb.ScoreRequest) -> list[tuple[list[int], int]]:
        """For each continuation the tokens of prompt and continuation, and where the latter
        begins. Text after text is encoded as one, for that is what the model has seen."""
        prompt = await self.prompt(request)
        found = []
        for item in convert.continuations(request):
            if item.WhichOneof("content") == "token_ids":
                whole = prompt + self._ids("continuations.token_ids.ids", item.token_ids.ids)
                found.append((whole, len(prompt)))
            elif request.WhichOneof("prompt") == "text":
                whole = await self.text(request.text + item.text)
                found.append((whole, _shared(prompt, whole)))
            else:
                found.append((prompt + await self._plain(item.text), len(prompt)))
        for whole, start in found:
            if not 1 <= start < len(whole):
                convert.refuse(
                    "continuations",
                    f"one that begins at token {start} of {len(whole)}",
                    "at least one token after at least one of the prompt",
                )
        return found

    async def bad_tokens(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word, as the beginning of a text and after a space."""

        def encoded() -> set[tuple[int, ...]]:
            forms = {form for word in words for form in (word, " " + word.lstrip(" "))}
            return {tuple(self._stripped(self._text.encode(form))) for form in forms} - {()}

        return tuple(sorted(await self._run(sum(map(len, words)), encoded)))

    async def _plain(self, text: str) -> list[int]:
        """Token ids without the special tokens that begin and end every text."""
        return self._stripped(await self.text(text))

    def _stripped(self, ids: list[int]) -> list[int]:
        empty = self._text.encode("")
        start = _shared(ids, empty)
        end = _shared(ids[start:][::-1], empty[start:][::-1])
        return ids[start : len(ids) - end]

    def decode(self, ids: Sequence[int], *, keep_special_tokens: bool) -> str:
        """The text of a prompt's token ids."""
        return self._text.decode(ids, skip_special_tokens=not keep_special_tokens)

    def detokenize(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        for i in ids:
            if i >= self._text.vocab_size:
                right = f"ids from 0 to {self._text.vocab_size - 1}"
                convert.refuse("token_ids", f"token id {i}", right)
        return self._text.decode(ids, skip_special_tokens=False)

    def _ids(self, field: str, ids: Sequence[int]) -> list[int]:
        """Token ids as given: some, and not so many that they cannot fit."""
        if not 1 <= len(ids) <= self._max_length:
            convert.refuse(field, f"{len(ids)} tokens", f"1 to {self._max_length} tokens")
        return list(ids)

    def _check_size(self, field: str, characters: int) -> None:
        most = self._max_length * CHARACTERS_PER_TOKEN
        if characters > most:
            right = f"at most {self._max_length} tokens"
            convert.refuse(field, f"text of {characters} characters", right)

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        if size <= SHORT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
