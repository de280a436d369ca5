"""From tokens to text as they come, and the search for stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

TAIL = 6
"""Prompt tokens that prime the decoder, so that the first piece has the right leading space."""
CHARACTER = 4
"""Bytes of the longest character; no token is less than one."""
WAIT = 16
"""Tokens without text after which they are not what a character begins with."""
BROKEN = "\ufffd"


class Detokenizer:
    """One request's text. `add` returns what can be shown: text that might be the beginning of a
    stop string is held back until it is decided. A stop string itself is never shown.

    A character that the prompt begins and the output completes is the output's. Bytes that are no
    text become U+FFFD.
    """

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
        self._stop = stop
        self._held = ""
        self._pending: list[int] = []
        self._stream: DecodeStream
        self.stopped_by = ""
        if tokenizer is not None:
            self._prime(prompt_ids)

    def add(self, token_id: int) -> str:
        """The text that `token_id` makes certain. Once `stopped_by` is set, the text has ended."""
        return "" if self._tokenizer is None else self._show(self._next(token_id))

    def finish(self) -> str:
        """No token follows: the text that was held back, and what an incomplete character decodes
        to (U+FFFD)."""
        rest = ""
        if self._pending:
            rest = self._text_of(self._pending)
            self._pending = []
        shown = self._show(rest) if rest else ""
        if self.stopped_by:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _prime(self, prompt_ids: tuple[int, ...]) -> None:
        """Begin after the prompt's end: `_context`, whole characters, and `_lead`, the beginning of
        one, shown as `_lead_text` unless it is completed. `DecodeStream` would take a context that
        ends within a character for output, and one that begins within one for broken throughout."""
        end = len(prompt_ids)
        starts = [max(0, end - size) for size in range(TAIL, TAIL + CHARACTER)]
        cuts = [(start, end - lead) for lead in range(CHARACTER) for start in starts]
        start, cut = next((at for at in cuts if self._is_whole(prompt_ids[slice(*at)])), (end, end))
        self._settle(list(prompt_ids[start:cut]))
        for token_id in prompt_ids[cut:]:
            self._next(token_id)
        self._lead, self._pending = self._pending, []
        self._lead_text = self._text_of(())

    def _is_whole(self, ids: Sequence[int]) -> bool:
        text = self._decode(ids)
        return not (text.startswith(BROKEN) or text.endswith(BROKEN))

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text

    def _text_of(self, ids: Sequence[int]) -> str:
        """What tokens add to all that came before."""
        before = self._decode(self._context)
        text = self._decode([*self._context, *self._lead, *ids])
        if not text.startswith(before):
            return self._decode(ids)
        return text.removeprefix(before).removeprefix(self._lead_text)

    def _next(self, token_id: int) -> str:
        assert self._tokenizer is not None
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:  # with the bytes behind it, what was a character is none any more
            piece = self._text_of(self._pending)
            self._settle(self._pending)
            return piece
        if piece is None:
            return self._give_up() if len(self._pending) > WAIT else ""
        piece = piece.removeprefix(self._lead_text)
        self._context, self._pending = self._pending, []
        self._lead, self._lead_text = [], ""
        return piece

    def _settle(self, context: list[int]) -> None:
        """Begin anew after tokens that were shown."""
        self._context, self._pending = context, []
        self._lead, self._lead_text = [], ""
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)

    def _give_up(self) -> str:
        """A decoder reads all that waits with every token: let most of it be as it is."""
        settled, rest = self._pending[: 1 - CHARACTER], self._pending[1 - CHARACTER :]
        text = self._text_of(settled)
        self._settle(self._context)
        return text + "".join(map(self._next, rest))

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
