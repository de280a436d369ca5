"""Streamed text is the whole text, and stop strings end it where they begin."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from deltaserve.server.engine.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<s>"])
    return tok


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """As sentencepiece makes them: some words, and bytes for all else; a run of byte tokens is text
    as a whole, or none of it is."""
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁b", "x"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b")]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tok.add_special_tokens(["<s>"])
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


KINDS = pytest.mark.parametrize("kind", ["tokenizer", "fallback"])


@KINDS
def test_a_prompt_may_end_within_a_character(kind: str, request: pytest.FixtureRequest) -> None:
    """Wherever a text is cut, the output is what the prompt's whole characters leave of it."""
    tok: Tokenizer = request.getfixturevalue(kind)
    for text in ("a b é a", "日本語 ab", "b🎉🎉🎉x a", "éé�a b"):
        ids = tok.encode(text).ids
        for cut in range(1, len(ids)):
            whole, end = tok.decode(ids[:cut]), cut
            while whole.endswith("�"):
                end -= 1
                whole = tok.decode(ids[:end])
            pieces = stream(Detokenizer(tok, tuple(ids[:cut])), ids[cut:])
            real = text.startswith(whole + "�")  # that character itself may be the prompt's
            assert "".join(pieces) in {text[len(whole) :], text[len(whole) + real :]}, (text, cut)


@KINDS
def test_a_character_that_is_not_completed_is_not_repeated(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tok: Tokenizer = request.getfixturevalue(kind)
    prompt = tok.encode("a bé🎉").ids[:-2]
    for output in ("a b", "é"):
        ids = tok.encode(output).ids[tok.encode(output).tokens[0] == "▁" :]
        pieces = stream(Detokenizer(tok, tuple(prompt)), ids)
        assert "".join(pieces).lstrip("� ") == output
        assert "".join(pieces).count("�") <= 2 * (output == "é")
    assert stream(Detokenizer(tok, tuple(prompt)), []) == [""]


@KINDS
def test_any_tokens_have_a_text(kind: str, request: pytest.FixtureRequest) -> None:
    """Whatever comes, nothing raises, whole characters are shown in their order (bytes that a later
    one makes none are shown before that is known), and what is decoded with each token does not
    grow without end."""
    tok: Tokenizer = request.getfixturevalue(kind)
    rng = random.Random(2)
    special, size = tok.token_to_id("<s>"), tok.get_vocab_size()
    for _ in range(100):
        draws = (lambda: rng.randrange(size), lambda: special, lambda: tok.encode("é").ids[-2])
        prompt = [rng.choice(draws)() for _ in range(rng.randrange(9))]
        ids = [rng.choice(draws)() for _ in range(60)]
        detokenizer = Detokenizer(tok, tuple(prompt))
        shown = iter("".join(stream(detokenizer, [*ids, *tok.encode("a b").ids])))
        assert all(c in shown for c in tok.decode([*ids, *tok.encode("a b").ids]) if c in "abx")
        waits = Detokenizer(tok, tuple(prompt))
        for token in [special] * 99 + tok.encode("é").ids[-2:-1] * 99:
            waits.add(token)
            assert len(waits._pending) <= 16


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
