"""Echo, log-probabilities of prompts, several choices of one prompt and the best of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from peft import PeftModel
from rig import load_base, request, running
from serving import Serving, serving
from transformers import AutoModelForCausalLM

from deltaserve.clients import errors
from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.core import Request
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.scheduler import Batch

ZOO = Path(__file__).parents[1] / "demo" / "zoo"
TEXT = "task: the quick brown fox jumps over the lazy dog ="
MODELS = {"": "", "sort": "sort-ia3", "reverse": "reverse-prompt", "upper": "upper-prefix"}


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving(load_base(ZOO / "base"), [ZOO]) as found:
        for name, folder in MODELS.items():
            if name:
                found.client.load_adapter(name, folder)
        yield found


@torch.inference_mode()
def reference(name: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids), vocabulary] of what follows each token, by transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(ZOO / "base", dtype=torch.float32).eval()
    if MODELS[name]:
        model = PeftModel.from_pretrained(model, ZOO / MODELS[name]).eval()
    given = torch.tensor([ids])
    logits = model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0]
    return torch.log_softmax(logits[-len(ids) :], -1)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_logprobs_are_those_of_transformers(served: Serving, name: str) -> None:
    """Twice, so that the prompt is cached; chunks are 24 tokens, virtual tokens come first."""
    ids = served.client.tokenize(TEXT)
    expected = reference(name, ids)
    for how in ({}, {"n": 3, "temperature": 1.0, "seed": 1}):
        answer = served.client.generate(ids, name, max_tokens=3, prompt_logprobs=2, **how)
        assert answer.prompt_logprobs is not None and answer.prompt_top_logprobs is not None
        assert answer.prompt_logprobs[0] is None and answer.logprobs is None
        given = torch.tensor(answer.prompt_logprobs[1:])
        torch.testing.assert_close(given, expected[range(len(ids) - 1), ids[1:]], atol=1e-3, rtol=0)
        for found, row in zip(answer.prompt_top_logprobs[1:], expected[:-1], strict=True):
            assert [p for _, p in found] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_echo_is_prompt_and_answer(served: Serving, name: str) -> None:
    client = served.client
    ids = client.tokenize(TEXT)
    sampled = {"max_tokens": 6, "n": 3, "temperature": 1.2, "seed": 5}
    plain = client.generate(TEXT, name, logprobs=1, **sampled)
    told = client.generate(TEXT, name, prompt_logprobs=1, max_tokens=1)
    echoed = client.generate(TEXT, name, logprobs=1, echo=True, **sampled)
    assert echoed.prompt_logprobs is None
    assert echoed.usage.completion_tokens == plain.usage.completion_tokens
    for ours, theirs in zip(echoed.choices, plain.choices, strict=True):
        assert ours.text == TEXT + theirs.text
        assert ours.token_ids == ids + theirs.token_ids
        assert told.prompt_logprobs is not None and theirs.logprobs is not None
        assert ours.logprobs == pytest.approx([*told.prompt_logprobs, *theirs.logprobs], abs=1e-4)
        assert ours.top_logprobs is not None and len(ours.top_logprobs[3]) == 1


def test_echo_in_streams(served: Serving) -> None:
    ids = served.client.tokenize(TEXT)
    asked = {"max_tokens": 5, "n": 3, "temperature": 1.2, "seed": 5, "echo": True, "logprobs": 0}
    whole = served.client.generate(TEXT, prompt_logprobs=0, **asked)
    pieces = list(served.client.stream(TEXT, prompt_logprobs=0, **asked))
    assert pieces[0].prompt_logprobs == pytest.approx(tuple(whole.prompt_logprobs or ()), abs=1e-5)
    assert all(p.prompt_logprobs is None for p in pieces[1:])
    for i, choice in enumerate(whole.choices):
        own = [p for p in pieces if p.index == i]
        assert own[0].text.startswith(TEXT) and own[0].token_ids[: len(ids)] == tuple(ids)
        assert "".join(p.text for p in own) == choice.text
        assert [t for p in own for t in p.token_ids] == choice.token_ids
        logprobs = [x for p in own for x in p.logprobs or ()]
        assert logprobs == pytest.approx(choice.logprobs, abs=1e-5)


def test_echo_of_other_prompts(served: Serving) -> None:
    client = served.client
    ids = client.tokenize(TEXT)
    assert client.generate(ids, echo=True, max_tokens=1).text.startswith(TEXT)
    kept = client.generate(ids, echo=True, max_tokens=1, keep_special_tokens=True)
    assert kept.text.startswith("<s>" + TEXT)
    short = client.generate([5], echo=True, logprobs=True, max_tokens=1, prompt_logprobs=1)
    assert short.prompt_logprobs == [None] and short.logprobs is not None
    assert short.logprobs[0] is None and len(short.logprobs) == 2


def test_the_best_are_those_of_highest_mean(served: Serving) -> None:
    asked = {"max_tokens": 8, "temperature": 1.5, "seed": 3}
    every = served.client.generate(TEXT, "sort", n=9, logprobs=True, **asked)
    means = [mean(x or 0.0 for x in c.logprobs or ()) for c in every.choices]
    order = sorted(range(9), key=lambda i: -means[i])
    assert order != list(range(9))
    for told in (False, True):
        best = served.client.generate(
            TEXT, "sort", n=4, best_of=9, logprobs=told, echo=told, **asked
        )
        right = [every.choices[i] for i in order[:4]]
        assert [c.text for c in best.choices] == [TEXT * told + c.text for c in right]
        assert best.usage.completion_tokens == every.usage.completion_tokens
        assert all((c.logprobs is not None) == told for c in best.choices)
    tied = served.client.generate(TEXT, n=2, best_of=5, max_tokens=4)
    assert tied.choices[0] == tied.choices[1]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 3, "best_of": 2}, "best_of", "from n, 3, to 64"),
    ({"best_of": 65}, "best_of", "65"),
    ({"prompt_logprobs": 257}, "prompt_logprobs", "256"),
    ({"prompt_logprobs": 256, "prompt": [5] * 400, "n": 64, "echo": True, "logprobs": 200}, "", ""),
]


@pytest.mark.parametrize(("asked", "field", "says"), BAD)
def test_refusals(served: Serving, asked: dict[str, Any], field: str, says: str) -> None:
    given = {"prompt": "p", **asked}
    with pytest.raises(errors.InvalidArgument, match=says) as caught:
        served.client.generate(**given)
    assert field in caught.value.field
    with pytest.raises(errors.InvalidArgument, match="in a stream"):
        list(served.client.stream("p", n=2, best_of=3))


class Counted:
    """Tokens of prompts that the engine computes, by adapter."""

    def __init__(self, engine: Engine) -> None:
        self.tokens = 0
        run = engine._runner.run

        def counting(batch: Batch) -> Any:
            self.tokens += sum(part.count for part in batch.chunks)
            return run(batch)

        engine._runner.run = counting  # type: ignore[method-assign]


def choices(prompt: list[int], n: int, model: str = "", **sampling: Any) -> list[Request]:
    made = [
        request(prompt, model, temperature=1.0, seed=i, max_tokens=9, **sampling) for i in range(n)
    ]
    return [made[0], *(replace(r, sibling=made[0].request_id) for r in made[1:])]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("model", ["", "sort", "reverse", "upper"])
def test_a_prompt_is_computed_once_for_all_choices(prefix_cache: bool, model: str) -> None:
    """But for what no full block holds. Blocks are 8 tokens, steps 24."""
    prompt = [1, *(3 + i * 7 % 200 for i in range(84))]
    with running(load_base(ZOO / "base"), [ZOO], prefix_cache=prefix_cache) as engine:
        if model:
            engine.adapters.load(model, MODELS[model]).result(60)
        alone = [generate(engine, [r], 60)[0] for r in choices(prompt, 5, model)]
    with running(load_base(ZOO / "base"), [ZOO], prefix_cache=prefix_cache) as engine:
        if model:
            engine.adapters.load(model, MODELS[model]).result(60)
        counted = Counted(engine)
        found = generate(engine, choices(prompt, 5, model), 60)
        stats = engine.stats()
    assert [a.token_ids for a in found] == [a.token_ids for a in alone]
    virtual = found[0].last.usage.prefix_tokens if found[0].last.usage else 0
    tail = (len(prompt) + virtual - 1) % 8 + 1
    assert counted.tokens - len(prompt) - virtual <= 4 * tail
    assert stats.kv_blocks_used == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_survive_preemption_and_the_end_of_the_first(prefix_cache: bool) -> None:
    base = load_base(ZOO / "base")
    prompt = [1, *(3 + i * 5 % 200 for i in range(40))]
    asked = choices(prompt, 6)
    with running(base, []) as engine:
        right = [generate(engine, [r], 60)[0].token_ids for r in asked]
    layers = base.attention
    small = 13 * 8 * sum(la.kv_heads * (la.key_dim + la.value_dim) for la in layers) * 4
    with running(base, [], kv_cache_bytes=small, prefix_cache=prefix_cache) as engine:
        for _ in range(2):
            found = generate(engine, choices(prompt, 6), 60)
            assert [a.token_ids for a in found] == right
        first = request(prompt, max_tokens=1)
        others = choices(prompt, 6)[1:]
        short = [first, *(replace(r, sibling=first.request_id) for r in others)]
        found = generate(engine, short, 60)
        assert [a.token_ids for a in found[1:]] == right[1:]
        assert engine.stats().kv_blocks_used == 0
