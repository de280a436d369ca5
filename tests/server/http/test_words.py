"""Tokens as text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import decoders

from deltaserve.server.http.words import Words

VOCABULARY = ["▁the", "▁quick", "ly", "▁", "<0xC3>", "<0xA9>", "x"]


class Decoded:
    """As tokenizers of Llama 2's kind: the space that begins a text goes, bytes may be tokens."""

    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self.decoder.decode([VOCABULARY[i] for i in ids])


@pytest.mark.parametrize("decoder", [Decoded.decoder, decoders.Metaspace()])
def test_a_token_is_shown_as_it_is_inside_a_text(decoder: Any) -> None:
    text: Any = Decoded()
    text.decoder = decoder
    words = Words(text, {})
    ids = [1, 2, 0, 3, 6]
    assert [words(i) for i in ids] == [" quick", "ly", " the", " ", "x"]
    assert "".join(map(words, [6, *ids])) == text.decode([6, *ids])


def test_a_part_of_a_character_is_no_text() -> None:
    text: Any = Decoded()
    words = Words(text, {})
    assert words(4) == words(5) == "\ufffd" and text.decode([4, 5]) == "é"
