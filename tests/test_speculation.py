"""Speculation changes how many steps an answer takes, and nothing of the answer.

Every test compares with the same requests without drafts, which `test_equivalence.py` compares with
transformers. Beside the engine's own drafts there are told ones: of the answer known from before,
some of them spoiled, so runs of every length are accepted and rejected whatever the model says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig
from rig import load_base, request, running
from serving import Serving, serving
from variants import ALL, VARIANTS, make_base, peft_variant

from deltaserve.server.engine.collector import Answer, generate
from deltaserve.server.engine.core import Request, Speculation
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.prompt_lookup import Drafter

TOLERANCE = 1e-3
INVOCATION = [7, 7, 9]
MORE = [
    peft_variant(
        "activated",
        lambda _: LoraConfig(r=4, target_modules=ALL, alora_invocation_tokens=INVOCATION),
    ),
    peft_variant(
        "adaption-prompt",
        lambda _: AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=2),
        additive=False,
    ),
]
KINDS = {**VARIANTS, **{v.name: v for v in MORE}}
ROOM = {"max_batch_tokens": 128}

GREEDY = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    {"logit_bias": ((5, 3.0), (9, 4.0)), "logprobs": 3},
    {"min_tokens": 9, "stop_token_ids": tuple(range(0, 256, 2))},
    {"stop_token_ids": tuple(range(0, 256, 7)), "ignore_eos": False},
    {"max_tokens": 2},
]
SAMPLED = [
    {"temperature": 0.3},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 0.7, "repetition_penalty": 1.5, "top_k": 20},
    {"temperature": 0.9, "frequency_penalty": 1.0, "presence_penalty": -0.5},
    {"temperature": 1.0, "logit_bias": ((3, 5.0),), "top_p": 0.9},
    {"temperature": 0.6, "min_tokens": 15, "stop_token_ids": tuple(range(0, 256, 3))},
    {"temperature": 0.6, "stop": ("a", "1"), "max_tokens": 60},
]
SETTINGS = [*GREEDY, *({**s, "seed": i} for i, s in enumerate(SAMPLED))]


class Told(Drafter):
    """Drafts what is known to come, some of it spoiled."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], seed: str) -> None:
        super().__init__(8, 2, 4)
        self._prompt, self._answer, self._random = prompt, answer, random.Random(seed)

    def draft(self, tokens: Sequence[int], most: int) -> Iterator[tuple[int, float]]:
        done = sum(t >= 0 for t in tokens) - len(self._prompt)
        count = min(most, self._random.randrange(9))
        # the answer may have ended early: what is drafted behind its end must be dropped
        for token in [*self._answer, *self._prompt * 9][done : done + count]:
            wrong = self._random.random() < 0.15
            yield (token + 1) % 256 if wrong else token, 1.0


def plainly(asked: Request) -> Request:
    return replace(asked, request_id=f"{asked.request_id}-plain", speculation=Speculation(0))


@contextmanager
def told(engine: Engine, answers: dict[str, Answer]) -> Iterator[list[Told]]:
    """Requests with these ids are drafted for by who knows their answers."""
    speculator = engine._scheduler.speculator
    assert speculator is not None
    made: list[Told] = []

    def drafter(asked: Request) -> Told:
        known = answers[asked.request_id].token_ids
        made.append(Told(asked.prompt_ids, known, asked.request_id))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator, "drafter", drafter)
        yield made


def same(found: Answer, plain: Answer, what: object) -> None:
    assert found.token_ids == plain.token_ids, what
    assert found.text == plain.text, what
    last, first = found.last, plain.last
    assert (last.finish_reason, last.stop_reason) == (first.finish_reason, first.stop_reason), what
    assert last.usage is not None and first.usage is not None
    assert last.usage.completion_tokens == first.usage.completion_tokens, what
    for ours, theirs in zip(found.logprobs, plain.logprobs, strict=True):
        assert ours.token_id == theirs.token_id, what
        assert abs(ours.logprob - theirs.logprob) < TOLERANCE, what
        assert len(ours.top) == len(theirs.top), what
        for (_, a), (_, b) in zip(ours.top, theirs.top, strict=True):
            assert abs(a - b) < TOLERANCE, what


def check_told(engine: Engine, asked: list[Request]) -> list[Told]:
    """With drafts in a run of their own, and in a batch with those without."""
    plain = generate(engine, [plainly(r) for r in asked], timeout=120)
    answers = {r.request_id: a for r, a in zip(asked, plain, strict=True)}
    with told(engine, answers) as drafters:
        found = generate(engine, asked, timeout=120)
    for r, answer, reference in zip(asked, found, plain, strict=True):
        same(answer, reference, r)
        usage = answer.last.usage
        assert usage is not None and usage.accepted_tokens < usage.completion_tokens
    return drafters


def check_own(engine: Engine, asked: list[Request]) -> tuple[int, int]:
    """(drafted, accepted) by prompt lookup."""
    plain = generate(engine, [plainly(r) for r in asked], timeout=120)
    found = generate(engine, asked, timeout=120)
    drafted = accepted = 0
    for r, answer, reference in zip(asked, found, plain, strict=True):
        same(answer, reference, r)
        assert answer.last.usage is not None and reference.last.usage is not None
        assert reference.last.usage.drafted_tokens == 0
        drafted += answer.last.usage.drafted_tokens
        accepted += answer.last.usage.accepted_tokens
    return drafted, accepted


def prompt(seed: int, low: int = 10, high: int = 60) -> list[int]:
    """Some of it twice."""
    generator = random.Random(seed)
    part = [generator.randrange(256) for _ in range(generator.randrange(low, high) // 2)]
    return [*part, *(generator.randrange(256) for _ in range(3)), *part]


def asking(text: int, adapters: str = "", **sampling: object) -> Request:
    made = request(prompt(text), adapters, **{"max_tokens": 24, **sampling})
    return replace(made, speculation=Speculation(8))


@pytest.fixture(scope="module", params=["llama", "mistral-sliding", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_base(folder / "base", request.param)
    generator = torch.Generator().manual_seed(1)
    for name, variant in KINDS.items():
        if name == "adaption-prompt" and request.param == "gemma2":
            continue  # PEFT has it for Llama and Mistral
        variant.make(folder / "base", folder / "adapters" / name, generator)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with running(load_base(folder / "base"), [folder / "adapters"], **ROOM) as made:
        for name in KINDS:
            if (folder / "adapters" / name).exists():
                made.adapters.load(name, str(folder / "adapters" / name)).result(timeout=60)
        yield made


@pytest.mark.parametrize("seed", range(3))
def test_every_setting_gives_the_same_tokens(engine: Engine, seed: int) -> None:
    asked = [asking(100 * seed + i, **s) for i, s in enumerate(SETTINGS)]
    drafters = check_told(engine, asked)
    drafted, accepted = sum(d.drafted for d in drafters), sum(d.accepted for d in drafters)
    assert 0.2 * drafted < accepted < 0.9 * drafted
    assert sum(d.accepted > 0 for d in drafters) > len(drafters) * 0.7


def test_every_kind_of_adapter_in_one_batch(engine: Engine) -> None:
    """Base rows between them; greedy and sampled."""
    names = [a.name for a in engine.adapters.list()]
    assert len(names) >= 18
    asked = []
    for i, name in enumerate(names):
        how = {"temperature": 0.7, "seed": i} if i % 2 else {}
        asked += [asking(i, name, **how), asking(50 + i, name), asking(i, **how)]
    asked.append(replace(asked[0], request_id="activates", prompt_ids=(*INVOCATION, *prompt(8))))
    drafters = check_told(engine, asked)
    assert all(d.accepted for d in drafters)


def narrow(tokens: int) -> dict[str, object]:
    """A random model that has so few tokens to say repeats itself."""
    return {"logit_bias": tuple((i, 50.0) for i in range(tokens)), "max_tokens": 60}


def test_own_drafts_are_accepted_where_the_answer_repeats(engine: Engine) -> None:
    names = ["", "lora", "bitdelta", "prompt-tuning", "prefix-tuning", "sparse"]
    drafted, accepted = check_own(
        engine, [asking(i, name, **narrow(3)) for i, name in enumerate(names)]
    )
    assert accepted > 100 and accepted > 0.5 * drafted


def test_own_drafts_with_sampling(engine: Engine) -> None:
    settings = [s for s in SETTINGS if "temperature" in s]
    asked = [asking(i, **{**s, **narrow(3)}) for i, s in enumerate(settings)]
    _, accepted = check_own(engine, asked)
    assert accepted > 50


def test_lookups_that_are_never_right_end_the_drafting(engine: Engine) -> None:
    """Hot sampling of a text with many repetitions in the prompt."""
    text = prompt(3)[:10] * 12
    made = request(text, max_tokens=100, temperature=50.0, seed=1)
    drafted, accepted = check_own(engine, [replace(made, speculation=Speculation(8, 1, 2))])
    assert accepted < 5 and drafted < 30


@pytest.mark.parametrize("stop", ["strings", "tokens"])
def test_a_stop_inside_an_accepted_run_ends_there(engine: Engine, stop: str) -> None:
    """At every place of the answer."""
    base = asking(7)
    answer = generate(engine, [plainly(base)], timeout=60)[0]
    asked = []
    for i, token in enumerate(answer.token_ids):
        if stop == "tokens":
            asked.append(asking(7, stop_token_ids=(token,)))
        elif answer.text[i : i + 2].isprintable() and answer.text[i : i + 2]:
            asked.append(asking(7, stop=(answer.text[i : i + 2],)))
    asked += [asking(7, max_tokens=n) for n in range(1, 25)]
    drafters = check_told(engine, asked)
    assert sum(d.accepted for d in drafters) > 24


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_tiny_caches(folder: Path, prefix_cache: bool, block_size: int) -> None:
    """Sequences are preempted and computed anew, with their generators where they were."""
    bytes_ = 200 * 2 * 2 * 2 * 16 * 4  # of 200 tokens: layers, K and V, heads, dim, float32
    room = {**ROOM, "kv_cache_bytes": bytes_, "block_size": block_size}
    model = load_base(folder / "base")
    with running(model, [folder / "adapters"], prefix_cache=prefix_cache, **room) as engine:
        for name in ("lora", "prefix-tuning"):
            engine.adapters.load(name, str(folder / "adapters" / name)).result(timeout=60)
        asked = []
        for i in range(12):
            how = {"temperature": 0.8, "seed": i} if i % 3 else {}
            asked.append(asking(i % 5, ["", "lora", "prefix-tuning"][i % 3], max_tokens=40, **how))
        drafters = check_told(engine, asked)
        assert engine.stats().preemptions > 0
        assert sum(d.accepted for d in drafters) > 100
        assert engine.stats().kv_blocks_used == 0


def test_the_prefix_cache_never_holds_rejected_tokens(engine: Engine) -> None:
    """Conversations that go on from an answer find the blocks of exactly that answer."""
    asked = [asking(i, "lora" if i % 2 else "", max_tokens=40) for i in range(6)]
    plain = generate(engine, [plainly(r) for r in asked], timeout=60)
    fresh = [replace(r, salt="fresh") for r in asked]
    answers = {r.request_id: a for r, a in zip(fresh, plain, strict=True)}
    with told(engine, answers):
        found = generate(engine, fresh, timeout=60)
    for r, answer in zip(fresh, found, strict=True):
        grown = replace(r, prompt_ids=(*r.prompt_ids, *answer.token_ids, 1, 2))
        cached, alone = generate(
            engine,
            [plainly(grown), replace(plainly(grown), salt="other", request_id="x")],
            timeout=60,
        )
        same(cached, alone, r)
        assert cached.last.usage is not None
        assert cached.last.usage.cached_tokens >= (len(grown.prompt_ids) - 2 - 1) // 8 * 8


def test_the_servers_default_and_the_requests_choice(folder: Path) -> None:
    """Which drafts, by the usage."""

    def drafted(engine: Engine, speculation: Speculation) -> int:
        asked = replace(request(prompt(1), **narrow(3)), speculation=speculation)
        usage = generate(engine, [asked], timeout=60)[0].last.usage
        assert usage is not None
        return usage.drafted_tokens

    model = load_base(folder / "base")
    with running(model, [], **ROOM, speculate=4) as engine:
        assert drafted(engine, Speculation()) > 0
        assert drafted(engine, Speculation(0)) == 0
        assert drafted(engine, Speculation(None, 16, 16)) < drafted(engine, Speculation(None, 1, 2))
    with running(model, [], **ROOM) as engine:
        assert drafted(engine, Speculation()) == 0
        assert drafted(engine, Speculation(4)) > 0


def test_fewer_steps(engine: Engine) -> None:
    """It is what all this is for."""
    asked = asking(1, **{**narrow(2), "max_tokens": 200})
    before = engine.stats().steps
    generate(engine, [plainly(asked)], timeout=60)
    between = engine.stats().steps
    generate(engine, [asked], timeout=60)
    assert engine.stats().steps - between < 0.5 * (between - before)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Serving]:
    folder = Path(__file__).parents[1] / "demo" / "zoo"
    with serving(load_base(folder / "base"), [folder], **ROOM) as found:
        found.client.load_adapter("shout", "shout-dora")
        yield found


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "((ab|cd|efgh) ){12,30}"},
        {"regex": "([a-d]{2} ){12,30}", "temperature": 0.8, "seed": 3},
        {"json_schema": {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 9}},
        {"bad_words": ["aa", "e", "g"], "ignore_eos": True},
        {"bad_words": ["ab", "b"], "temperature": 0.4, "seed": 5, "ignore_eos": True},
        {"n": 3, "temperature": 0.3, "seed": 7, "ignore_eos": True},
    ],
    ids=lambda asked: "-".join(asked),
)
@pytest.mark.parametrize("model", ["", "shout"])
def test_over_the_wire(zoo: Serving, model: str, asked: dict[str, Any]) -> None:
    """Constraints follow the accepted tokens; streams give them in one piece."""
    how = {"model": model, "max_tokens": 90, "logprobs": True, **asked}
    text = "task: abcdefghabcdefgh ="
    plain = zoo.client.generate(text, **how, speculation={"draft_tokens": 0})
    found = zoo.client.generate(text, **how, speculation={"draft_tokens": 16})
    assert [c.text for c in found.choices] == [c.text for c in plain.choices]
    assert [c.token_ids for c in found.choices] == [c.token_ids for c in plain.choices]
    assert [c.finish_reason for c in found.choices] == [c.finish_reason for c in plain.choices]
    for ours, theirs in zip(found.choices, plain.choices, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)
    assert (plain.usage.drafted_tokens, plain.usage.accepted_tokens) == (0, 0)
    assert 10 < found.usage.accepted_tokens <= found.usage.drafted_tokens
    pieces = list(zoo.client.stream(text, **how, speculation={"draft_tokens": 16}))
    for choice in range(len(plain.choices)):
        mine = [p for p in pieces if p.index == choice]
        assert "".join(p.text for p in mine) == plain.choices[choice].text
        assert max(len(p.token_ids) for p in mine) > 2
