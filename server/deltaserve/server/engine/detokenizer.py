"""From tokens to text as they come, and the search for stop strings."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

TAIL = 6
"""Prompt tokens that prime the decoder, so that the first piece has the right leading space."""


class Detokenizer:
    """One request's text. `add` returns what can be shown: text that might be the beginning of a
    stop string is held back until it is decided. A stop string itself is never shown."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: tuple[int, ...],
        stop: tuple[str, ...] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = (
            DecodeStream(ids=list(prompt_ids[-TAIL:]), skip_special_tokens=skip_special_tokens)
            if tokenizer is not None
            else None
        )
        self._stop = stop
        self._held = ""
        self._pending: list[int] = []
        self.stopped_by = ""

    def add(self, token_id: int) -> str:
        """The text that `token_id` makes certain. Once `stopped_by` is set, the text has ended."""
        if self._stream is None or self._tokenizer is None:
            return ""
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            self._pending.append(token_id)
            return ""
        self._pending.clear()
        return self._show(piece)

    def finish(self) -> str:
        """No token follows: the text that was held back, and what an incomplete character decodes
        to (U+FFFD)."""
        rest = ""
        if self._pending and self._tokenizer is not None:
            rest = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip)
            self._pending.clear()
        shown = self._show(rest) if rest else ""
        if self.stopped_by:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _show(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        found = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda f: (f[0], -len(f[1])))
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
