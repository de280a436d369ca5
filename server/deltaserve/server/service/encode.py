"""Prompts -> token ids, off the event loop where it takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from deltaserve.adapters.errors import AdapterError
from deltaserve.server.errors import InvalidRequest, RequestError
from deltaserve.server.service import converse, convert
from deltaserve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.text import Text

T = TypeVar("T")

SHORT = 2048
"""Characters that are encoded at once: it takes about as long as handing over to a thread."""
CHARACTERS_PER_TOKEN = 256
"""Text with more characters than this times the model's limit cannot fit: it is not encoded."""


class Encoders:
    """The base's encoder, and those of adapters that bring their own. max_length: tokens that the
    model takes. own: the tokenizer that an adapter brings, by what requests call it."""

    def __init__(
        self, text: Text, max_length: int, own: Callable[[str], Future[Text | None]]
    ) -> None:
        self._own = own
        self._max_length = max_length
        self._threads = _threads("deltaserve-encode")
        self._strange = _threads("deltaserve-encode-own")
        self.base = Encoder(text, max_length, self._threads)

    async def of(self, adapters: Iterable[str], *, known: bool = False) -> Encoder:
        """For a request with these adapters: the one tokenizer that they bring, or the base's.
        known: raise what is wrong with them; else their request will say it."""
        found: dict[Text, str] = {}
        for name in adapters:
            try:
                text = await asyncio.wrap_future(self._own(name))
            except (RequestError, AdapterError):
                if known:
                    raise
                continue
            if text is not None:
                found.setdefault(text, name)
        if len(found) > 1:
            names = " and ".join(map(repr, list(found.values())[:2]))
            right = "adapters that bring no tokenizers of their own, or the same"
            convert.refuse("adapters", f"{names}, which bring different tokenizers,", right)
        for text in found:
            return Encoder(text, self._max_length, self._strange)
        return self.base

    def close(self) -> None:
        """End the threads."""
        for threads in (self._threads, self._strange):
            threads.shutdown(wait=False, cancel_futures=True)


def _threads(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix=name)


class Encoder:
    """Encodes prompts with one tokenizer. What adapters bring is encoded on threads of their own:
    its expressions may take long."""

    def __init__(self, text: Text, max_length: int, threads: ThreadPoolExecutor) -> None:
        self.tokenizer = text
        self._text = text
        self._max_length = max_length
        self._threads = threads

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
        conversation, size = converse.conversation(chat)
        self._check_size("chat.messages", size)
        try:
            return await self._run(size, lambda: self._text.chat(conversation))
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
        self._check_size("text", len(text))
        return await self._run(len(text), lambda: self._stripped(self._text.encode(text)))

    def specials(self, ids: list[int]) -> tuple[int, int]:
        """How many tokens at the beginning and at the end of a text's are not of the text."""
        empty = self._text.encode("")
        start = _shared(ids, empty)
        return start, _shared(ids[start:][::-1], empty[start:][::-1])

    def _stripped(self, ids: list[int]) -> list[int]:
        start, end = self.specials(ids)
        return ids[start : len(ids) - end]

    async def decode(self, ids: Sequence[int], *, keep_special_tokens: bool) -> str:
        """The text of a prompt's token ids."""
        return await self._run(
            len(ids), lambda: self._text.decode(ids, skip_special_tokens=not keep_special_tokens)
        )

    async def offsets(self, text: str) -> list[tuple[int, int]]:
        """Of each token of a text, as `Text.offsets`."""
        return await self._run(len(text), lambda: self._text.offsets(text))

    async def detokenize(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        for i in ids:
            if i >= self._text.vocab_size:
                right = f"ids from 0 to {self._text.vocab_size - 1}"
                convert.refuse("token_ids", f"token id {i}", right)
        return await self.decode(ids, keep_special_tokens=True)

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
        if size <= SHORT and self._text.trusted:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
