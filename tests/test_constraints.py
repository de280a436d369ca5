"""Constrained answers are of their grammar, whatever else the request asks for and whoever else is
served; what cannot be a grammar is refused, and what would harm the server as well."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import regex
import torch
from rig import load_base, request, running
from serving import Bystander, Serving, serving
from tokenizers import Tokenizer
from typer.testing import CliRunner

from deltaserve.clients import errors
from deltaserve.clients.cli import app
from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.constraint import Constraint
from deltaserve.server.engine.core import Request
from deltaserve.server.engine.matcher import Grammars
from deltaserve.server.errors import InvalidRequest

ZOO = Path(__file__).parents[1] / "demo" / "zoo"
EOS = 2
REGEXES = [
    r"[a-c]{2,6}",
    r"(yes|no|maybe)( (yes|no))*",
    r"[0-9]{3}-[0-9]{4}",
    r"([a-z]{1,4} ){1,3}end",
    r"a*b?c+",
    r"x|xy|xyz",
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ZOO / "base" / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer, 300, [EOS])
    yield made
    made.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving(load_base(ZOO / "base"), [ZOO]) as found:
        found.client.load_adapter("sort", "sort-ia3")
        found.client.load_adapter("shout", "shout-dora")
        yield found


@pytest.mark.parametrize("pattern", REGEXES)
def test_masks_are_those_of_another_regex_engine(
    tokenizer: Tokenizer, grammars: Grammars, pattern: str
) -> None:
    """A token is allowed if the text with it is the beginning of a match."""
    pieces = {i: tokenizer.decode([i]) for i in range(3, tokenizer.get_vocab_size())}
    pieces = {i: piece for i, piece in pieces.items() if piece.isascii()}
    reference = regex.compile(pattern)
    draw = random.Random(pattern)
    for _ in range(5):
        (matcher,) = grammars.matchers(Constraint("regex", pattern), 1)
        text, outputs = "", []
        while len(outputs) < 20 and not matcher.ended(outputs):
            allowed = matcher.allowed(outputs)
            assert allowed.shape == (300,)
            assert bool(allowed[EOS]) == bool(reference.fullmatch(text))
            expected = {i for i, p in pieces.items() if reference.fullmatch(text + p, partial=True)}
            assert set(allowed.nonzero().flatten().tolist()) - {EOS} == expected
            outputs.append(draw.choice(sorted(expected)))
            text += pieces[outputs[-1]]


def test_a_matcher_keeps_its_state_apart_from_its_twins(grammars: Grammars) -> None:
    one, two = grammars.matchers(Constraint("choice", texts=("ab", "cd")), 2)
    a = int(one.allowed([]).nonzero()[0])
    before = two.allowed([])
    assert int(one.allowed([a]).sum()) == 1
    assert torch.equal(two.allowed([]), before) and int(before.sum()) == 2


ASKED = [
    *({"regex": pattern} for pattern in REGEXES),
    {"json_schema": SCHEMA},
    {"json_schema": json.dumps(SCHEMA)},
    {"choice": ["one", "two words", 'odd "\\/\n é']},
    {"grammar": 'start: word (", " word)* "."\nword: /[a-z]{1,4}/'},
]


def is_of(asked: dict[str, object], text: str) -> bool:
    if "regex" in asked:
        return bool(regex.fullmatch(str(asked["regex"]), text))
    if "choice" in asked:
        return text in asked["choice"]  # type: ignore[operator]
    if "grammar" in asked:
        return bool(regex.fullmatch(r"[a-z]{1,4}(, [a-z]{1,4})*\.", text))
    found = json.loads(text)
    return (
        found.keys() == {"name", "age", "kind"}
        and len(found["name"]) <= 6
        and 0 <= found["age"] <= 120
        and found["kind"] in ("cat", "dog")
    )


@pytest.mark.parametrize("asked", ASKED, ids=lambda a: next(iter(a)))
def test_answers_are_of_the_grammar(served: Serving, asked: dict[str, object]) -> None:
    for i, model in enumerate(["", "sort", "shout"]):
        answer = served.client.generate(
            "task: fig =", model, max_tokens=200, temperature=2.0, seed=i, n=3, **asked
        )
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                assert is_of(asked, choice.text), choice
            else:
                assert choice.finish_reason == "length"
        assert any(c.finish_reason == "stop" for c in answer.choices)


def test_streams_are_of_the_grammar(served: Serving) -> None:
    pieces = list(
        served.client.stream("task: fig =", max_tokens=200, temperature=1.0, json_schema=SCHEMA)
    )
    assert pieces[-1].finish_reason == "stop"
    assert is_of({"json_schema": SCHEMA}, "".join(p.text for p in pieces))


def test_any_json_object(served: Serving) -> None:
    found = [
        served.client.generate(
            "copy: x =", max_tokens=60, temperature=1.5, seed=s, json_object=True
        )
        for s in range(6)
    ]
    whole = [json.loads(a.text) for a in found if a.finish_reason == "stop"]
    assert whole and all(isinstance(value, dict) for value in whole)
    assert all(a.text.lstrip().startswith("{") for a in found)


def test_log_probabilities_are_of_the_raw_distribution(served: Serving) -> None:
    answer = served.client.generate("task: fig =", max_tokens=40, logprobs=True, regex="[xyz]{9}")
    prompt = served.client.tokenize("task: fig =")
    (score,) = served.client.score(prompt, [answer.token_ids])
    assert answer.logprobs == pytest.approx(score.logprobs, abs=1e-3)
    assert not score.greedy


def test_other_fields_narrow_it_further(served: Serving) -> None:
    client = served.client
    always = {"max_tokens": 20, "choice": ["abc", "xyz", "xbc"]}
    ids = {c: client.tokenize(c)[-1] for c in "ax"}
    assert client.generate("p", logit_bias={ids["x"]: 900}, **always).text[0] == "x"
    assert client.generate("p", logit_bias={ids["a"]: 900}, **always).text == "abc"
    assert (
        client.generate("p", logit_bias={ids["x"]: 900}, bad_words=["xb"], **always).text == "xyz"
    )
    assert client.generate("p", bad_words=["a", "xy"], **always).text == "xbc"
    assert client.generate("p", stop=["bc"], bad_words=["xy"], **always).text in ("a", "x")


def test_a_dead_end_says_so(served: Serving) -> None:
    stuck = served.client.generate("p", max_tokens=20, regex="ab+c", bad_words=["b"])
    assert (stuck.text, stuck.finish_reason) == ("a", "dead_end")
    stuck = served.client.generate("p", max_tokens=20, regex="abc", bad_words=["a"], n=2)
    assert [(c.text, c.finish_reason) for c in stuck.choices] == [("", "dead_end")] * 2
    short = served.client.generate("p", max_tokens=20, min_tokens=9, regex="abc")
    assert (short.text, short.finish_reason) == ("abc", "dead_end")
    assert served.client.generate("p", max_tokens=20, min_tokens=3, regex="abc?").text == "abc"


def test_it_goes_on_without_the_end_of_sequence(served: Serving) -> None:
    greedy = {"max_tokens": 30, "logit_bias": {EOS: 900}}
    assert served.client.generate("p", regex="a{3,9}", **greedy).text == "aaa"
    full = served.client.generate("p", regex="a{3,9}", ignore_eos=True, **greedy)
    assert (full.text, full.finish_reason) == ("aaaaaaaaa", "stop")


def constrained(grammars: Grammars, asked: Request, pattern: str) -> Request:
    (matcher,) = grammars.matchers(Constraint("regex", pattern), 1)
    return replace(asked, matcher=matcher)


@pytest.mark.parametrize("speculate", [0, 6])
def test_preemption_and_drafts_change_nothing(tokenizer: Tokenizer, speculate: int) -> None:
    model = load_base(ZOO / "base")
    grammars = Grammars(tokenizer, model.vocab_size, [EOS])
    pattern = "((abcd|abce|xyz)+,){2,40}"

    def ask(n: int) -> list[Request]:
        return [
            constrained(
                grammars,
                request([1, *range(5, 40 + i)], max_tokens=50, temperature=t, seed=i),
                pattern,
            )
            for i, t in enumerate([0.0, 1.0, 1.5, 0.0, 0.7][:n])
        ]

    with running(model, [], prefix_cache=False) as engine:
        plain = generate(engine, ask(5), 120)
    layers = model.attention
    small = 20 * 8 * sum(la.kv_heads * (la.key_dim + la.value_dim) for la in layers) * 4
    with running(model, [], kv_cache_bytes=small, speculate=speculate) as engine:
        found = generate(engine, ask(5), 120)
        stats = engine.stats()
    assert stats.preemptions > 0
    assert [a.token_ids for a in found] == [a.token_ids for a in plain]
    for answer in found:
        assert regex.fullmatch(pattern, answer.text, partial=True)
    grammars.close()


BAD = [
    ({"json_schema": "{"}, "constraint.json_schema", "line 1"),
    ({"json_schema": {"type": "objet"}}, "constraint.json_schema", "objet"),
    ({"json_schema": {"type": "object", "minProperties": 3, "if": {}}}, "json_schema", "if"),
    ({"json_schema": {"$ref": "http://localhost/x"}}, "constraint.json_schema", "localhost"),
    ({"regex": "(a"}, "constraint.regex", "unclosed group"),
    ({"regex": ""}, "constraint.regex", "not empty"),
    ({"regex": "a\0"}, "constraint.regex", "NUL"),
    ({"regex": "a" * 300_000}, "constraint.regex", "262144"),
    ({"grammar": "start: nothing"}, "constraint.grammar", "nothing"),
    ({"grammar": "start: start"}, "constraint.grammar", "no text"),
    ({"choice": []}, "constraint.choice", "1 to 4096"),
    ({"choice": ["a", ""]}, "constraint.choice", "not empty"),
    ({"choice": ["a"] * 10_000}, "constraint.choice", "10000"),
    ({"json_object": False}, "constraint.json_object", "true"),
]


@pytest.mark.parametrize(("asked", "field", "says"), BAD, ids=lambda v: str(v)[:24])
def test_what_is_no_grammar_is_refused(
    served: Serving, asked: dict[str, object], field: str, says: str
) -> None:
    with pytest.raises(errors.InvalidArgument, match=says) as caught:
        served.client.generate("p", **asked)
    assert caught.value.field.endswith(field)


def chain(rules: int) -> str:
    named = [f"r{i}: r{i + 1}" for i in range(rules)]
    return "\n".join(["start: r0", *named, f'r{rules}: "a"'])


BOMBS = {
    "stack": {"grammar": chain(15_000)},
    "time": {"grammar": "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}/" for i in range(100))},
    "space": {"json_schema": {"type": "integer", "multipleOf": 1_000_003}},
    "nesting": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
}


def test_bombs_are_refused_and_nobody_notices(served: Serving) -> None:
    prompt = served.client.tokenize("task: fig =")
    alone = served.client.generate(prompt, max_tokens=40, ignore_eos=True).token_ids
    bystander = Bystander(served, prompt, "", alone)
    bystander.start()
    for name, asked in BOMBS.items():
        with pytest.raises(errors.InvalidArgument) as caught:
            served.client.generate("p", **asked)
        assert caught.value.field.startswith("constraint."), name
    assert served.client.generate("p", regex="ab").text == "ab"
    bystander.finish()


def test_a_grammar_that_grows_too_large_ends_its_request_alone(served: Serving) -> None:
    """Ambiguous to the library's limit after some tokens: the others of the batch go on."""
    asked = {"grammar": 'start: (("a"{1,1000}){1,1000}){1,1000}', "max_tokens": 400}
    prompt = served.client.tokenize("task: fig =")
    alone = served.client.generate(prompt, max_tokens=40, ignore_eos=True).token_ids
    bystander = Bystander(served, prompt, "", alone)
    bystander.start()
    with pytest.raises(errors.InvalidArgument, match="cannot be followed after") as caught:
        served.client.generate("p", ignore_eos=True, **asked)
    assert caught.value.field == "constraint"
    bystander.finish()


def test_without_a_tokenizer_it_is_refused() -> None:
    grammars = Grammars(None, 10, [EOS])
    with pytest.raises(InvalidRequest, match="tokenizer"):
        grammars.matchers(Constraint("regex", "a"), 1)


def test_tokens_beyond_the_tokenizer_are_never_chosen(grammars: Grammars) -> None:
    (matcher,) = grammars.matchers(Constraint("regex", r"(.|\n)*"), 1)
    allowed = matcher.allowed([])
    assert not allowed[265:].any() and allowed[EOS] and not allowed[:2].any()


def test_the_command_line(served: Serving, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema", tmp_path / "grammar"
    schema.write_text('{"enum": ["x1"]}')
    grammar.write_text('start: "ab" "c"')
    for options, text in (
        (["--regex", "a{3}"], "aaa"),
        (["--json-schema", str(schema)], '"x1"'),
        (["--json-schema", '{"const": 7}'], "7"),
        (["--grammar", str(grammar)], "abc"),
        (["--choice", "xy", "--no-stream"], "xy"),
        (["--choice", "q", "--choice", "xy", "--bad-word", "q", "--best-of", "2"], "xy"),
        (["--regex", "b", "--echo"], "pb"),
    ):
        done = CliRunner().invoke(app, ["generate", "p", *options, "--address", served.address])
        assert (done.exit_code, done.stdout) == (0, text + "\n"), done.output
    wrong = CliRunner().invoke(app, ["generate", "p", "--json-schema", str(tmp_path / "none")])
    assert wrong.exit_code == 2
