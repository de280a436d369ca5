"""Streamed text is the whole text, and stop strings end it where they begin."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deltaserve.server.engine.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return tok


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    pieces = []
    for i in ids:
        pieces.append(detokenizer.add(i))
        if detokenizer.stopped_by:
            return pieces
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("text", ["plain", "héllo wörld", "日本語 🎉 done", "👩‍👩‍👧 flags 🇪🇺"])
def test_pieces_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    pieces = stream(Detokenizer(tokenizer, tuple(tokenizer.encode("prompt ").ids)), ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_an_incomplete_character_is_flushed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("aé").ids[:-1]
    assert "".join(stream(Detokenizer(tokenizer, ()), ids)) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "shown", "by"),
    [
        ("one two three", (" tw",), "one", " tw"),
        ("one two three", ("xyz",), "one two three", ""),
        ("aaab", ("aab",), "a", "aab"),
        ("abcabd", ("abd", "cab"), "ab", "cab"),
        ("ends with par", ("partial",), "ends with par", ""),
    ],
)
def test_stop_strings(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...], shown: str, by: str
) -> None:
    detokenizer = Detokenizer(tokenizer, (), stops)
    assert "".join(stream(detokenizer, tokenizer.encode(text).ids)) == shown
    assert detokenizer.stopped_by == by


def test_nothing_of_a_stop_string_is_ever_shown(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(20))
        stop = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 5)))
        detokenizer = Detokenizer(tokenizer, (), (stop,))
        shown = "".join(stream(detokenizer, tokenizer.encode(text).ids))
        assert shown == text.partition(stop)[0]
