"""Words: tokens as text, for log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from deltaserve.server.service.encode import Encoders
from deltaserve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.text import Text


class Words:
    """The texts of one tokenizer's tokens. A token is shown as it is inside a text: with its space
    before."""

    def __init__(self, text: Text, known: dict[int, str]) -> None:
        self._text = text
        self._known = known

    def __call__(self, token_id: int) -> str:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._inside(token_id)
        return found

    def _inside(self, token_id: int) -> str:
        """What a second one adds to a first: decoders strip the space that begins a text."""
        once = self._text.decode([token_id], skip_special_tokens=False)
        twice = self._text.decode([token_id] * 2, skip_special_tokens=False)
        return twice[len(once) :]


class Numbers:
    """Tokens as ``token_id:17``, for clients that ask for it."""

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}"


class Vocabularies:
    """Words of each tokenizer, kept as long as it."""

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self._known: WeakKeyDictionary[Text, dict[int, str]] = WeakKeyDictionary()

    async def of(self, served: pb.ServedBy) -> Words:
        """Of the tokenizer that an answer was made with."""
        groups: list[Iterable[pb.ServedAdapter]] = [served.adapters]
        groups += [member.adapters for member in served.members]
        names = [adapter.name for group in groups for adapter in group]
        text = (await self._encoders.of(names)).tokenizer
        return Words(text, self._known.setdefault(text, {}))
