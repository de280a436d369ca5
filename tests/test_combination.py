"""Combinations give what transformers and PEFT give alone, combined token by token in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rig import load_base, request, running
from variants import VARIANTS, logits_of, make_base, open_base

from deltaserve.server.engine.collector import Answer, generate
from deltaserve.server.engine.core import AdapterRef, Combination, Member, Request, Rule
from deltaserve.server.engine.engine import Engine

TOLERANCE = 1e-3
KINDS = ("lora", "dora", "ia3", "bitdelta", "half-fine-tune", "prompt-tuning", "prefix-tuning")
Array = npt.NDArray[np.float64]


class Family:
    """One base with adapters of several kinds and the reference of each; "" is the base."""

    def __init__(self, root: Path) -> None:
        self.folder, self.adapters = root / "base", root / "adapters"
        make_base(self.folder, "llama")
        self.adapters.mkdir()
        generator = torch.Generator().manual_seed(1)
        self.references: dict[str, Any] = {"": open_base(self.folder)}
        for name in KINDS:
            VARIANTS[name].make(self.folder, self.adapters / name, generator)
            made = VARIANTS[name].reference(self.references[""], self.adapters / name)
            self.references[name] = made


@dataclass(frozen=True)
class Case:
    """(adapter, weight) of each member; own: prompts by member index."""

    members: tuple[tuple[str, float], ...]
    rule: Rule = Rule.MEAN
    plausibility: float = 0.0
    own: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def request(self, prompt: Sequence[int], **sampling: object) -> Request:
        own = dict(self.own)
        members = tuple(
            Member((AdapterRef(name),) if name else (), weight, own.get(i))
            for i, (name, weight) in enumerate(self.members)
        )
        combination = Combination(members, self.rule, self.plausibility, disagreement=True)
        return replace(request(prompt, **sampling), combination=combination)

    def prompt(self, i: int, prompt: Sequence[int]) -> list[int]:
        return list(dict(self.own).get(i, prompt))

    def each(self, family: Family, prompt: Sequence[int], outputs: Sequence[int]) -> Array:
        """Log-probabilities [members, outputs, vocabulary] of the members' references."""
        found = []
        for i, (name, _) in enumerate(self.members):
            ids = [*self.prompt(i, prompt), *outputs]
            logits = logits_of(family.references[name], ids[:-1])
            found.append(torch.log_softmax(logits[-len(outputs) :].double(), -1).numpy())
        return np.stack(found)

    def combined(self, each: Array) -> Array:
        """-> [outputs, vocabulary]."""
        p, w = np.exp(each), np.array([w for _, w in self.members])[:, None, None]
        mixed: Array = (w * p).sum(0) if self.rule is Rule.MEAN else np.prod(p**w, 0)
        floor = self.plausibility * p[0].max(-1, keepdims=True)
        mixed = np.where(p[0] >= floor, mixed, 0.0)
        with np.errstate(divide="ignore"):
            logged: Array = np.log(mixed / mixed.sum(-1, keepdims=True))
        return logged


CASES = {
    "an ensemble": Case((("lora", 1.0), ("dora", 1.0), ("ia3", 1.0))),
    "all kinds": Case(tuple((name, 1.0 + i) for i, name in enumerate(KINDS))),
    "with the base": Case((("", 2.0), ("bitdelta", 1.0))),
    "emulated fine-tuning": Case(
        (("", 1.0), ("lora", 0.7), ("half-fine-tune", -0.7)), Rule.PRODUCT, plausibility=0.05
    ),
    "contrast": Case((("dora", 1.5), ("", -0.5)), Rule.PRODUCT, plausibility=0.1),
    "virtual tokens": Case(
        (("prefix-tuning", 1.0), ("prompt-tuning", 1.0), ("", -0.3)), Rule.PRODUCT
    ),
    "prompts of their own": Case(
        (("", 1.0), ("", 0.5), ("lora", -0.25)),
        Rule.PRODUCT,
        own=((1, tuple(range(30, 71))), (2, (5,))),
    ),
    "one token each": Case(
        (("prefix-tuning", 1.0), ("prompt-tuning", 1.0), ("lora", 1.0)),
        own=((0, (9,)), (1, (9,)), (2, (9,))),
    ),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("combination"))


@pytest.fixture(scope="module")
def engine(family: Family) -> Iterator[Engine]:
    with loaded(family) as made:
        yield made


@contextmanager
def loaded(family: Family, **config: object) -> Iterator[Engine]:
    """An engine of its own with all adapters."""
    with running(load_base(family.folder), [family.adapters], **config) as engine:  # type: ignore[arg-type]
        for name in KINDS:
            engine.adapters.load(name, str(family.adapters / name)).result(timeout=60)
        yield engine


def text(seed: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n,), generator=generator).tolist()


def check(family: Family, case: Case, prompt: Sequence[int], answer: Answer) -> None:
    """Teacher-forced: given our tokens, the reference would have chosen each, with these
    log-probabilities and this disagreement."""
    each = case.each(family, prompt, answer.token_ids)
    combined = case.combined(each)
    told = answer.disagreements
    assert len(answer.token_ids) == len(answer.logprobs) == len(told) > 0
    for i, (token, ours) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        assert abs(ours.logprob - combined[i, token]) < TOLERANCE, i
        assert combined[i, token] > combined[i].max() - 1e-4, i
        assert np.abs(np.array(told[i].logprobs) - each[:, i, token]).max() < TOLERANCE
        assert abs(told[i].divergence - divergence(case, each[:, i])) < TOLERANCE


def divergence(case: Case, each: Array) -> float:
    w = np.array([w if case.rule is Rule.MEAN else 1.0 for _, w in case.members])
    pi, p = (w / w.sum())[:, None], np.exp(each)
    mixed = (pi * p).sum(0)
    return float((pi[:, 0] * (p * each).sum(-1)).sum() - (mixed * np.log(mixed)).sum())


def test_every_case_in_one_batch(family: Family, engine: Engine) -> None:
    """Between them ordinary requests, which get what they get alone."""
    plain = [request(text(90 + i, 20 + i), name) for i, name in enumerate(["", "lora", "bitdelta"])]
    alone = [a.token_ids for a in generate(engine, plain, timeout=60)]
    prompts = [text(i, 10 + 7 * i) for i in range(len(CASES))]
    asked = [c.request(p) for c, p in zip(CASES.values(), prompts, strict=True)]
    again = [replace(r, request_id=f"again-{r.request_id}") for r in plain]
    mixed = [*asked[:3], *again, *asked[3:]]
    answers = dict(
        zip([r.request_id for r in mixed], generate(engine, mixed, timeout=120), strict=True)
    )
    for case, prompt, r in zip(CASES.values(), prompts, asked, strict=True):
        check(family, case, prompt, answers[r.request_id])
    assert [answers[r.request_id].token_ids for r in again] == alone


def test_seeded_sampling_draws_from_the_combined_distribution(
    family: Family, engine: Engine
) -> None:
    """The sampler's inversion, of the reference's probabilities."""
    names = ("an ensemble", "emulated fine-tuning", "contrast", "prompts of their own")
    cases = [CASES[name] for name in names]
    prompts = [text(40 + i, 15) for i in range(len(cases))]
    asked = [c.request(p, temperature=0.8, seed=7) for c, p in zip(cases, prompts, strict=True)]
    for case, prompt, answer in zip(cases, prompts, generate(engine, asked, 60), strict=True):
        generator = torch.Generator().manual_seed(7)
        combined = case.combined(case.each(family, prompt, answer.token_ids))
        for i, token in enumerate(answer.token_ids):
            summed = torch.softmax(torch.tensor(combined[i]).double() / 0.8, -1).cumsum(-1)
            number = torch.rand((), dtype=torch.float64, generator=generator)
            assert token == int((summed <= number).sum())
            assert abs(answer.logprobs[i].logprob - combined[i, token]) < TOLERANCE
        assert len({*answer.token_ids}) > 3


def test_penalties_bias_and_min_tokens_apply_once(family: Family, engine: Engine) -> None:
    case, prompt = CASES["an ensemble"], text(3, 20)
    plain = generate(engine, [case.request(prompt)], 60)[0]
    first = plain.token_ids[0]
    given: dict[str, object] = {
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "logit_bias": ((first, -4.0), (17, 1.0)),
    }
    answer = generate(engine, [case.request(prompt, **given)], 60)[0]
    combined = case.combined(case.each(family, prompt, answer.token_ids))
    for i, token in enumerate(answer.token_ids):
        scores = combined[i].copy()
        scores[first] -= 4.0
        scores[17] += 1.0
        seen = sorted({*prompt, *answer.token_ids[:i]})
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / 1.3, scores[seen] * 1.3)
        for before in answer.token_ids[:i]:
            scores[before] -= 0.5
        scores[sorted({*answer.token_ids[:i]})] -= 1.5
        assert token == scores.argmax()
    assert answer.token_ids != plain.token_ids


@pytest.mark.parametrize("name", ["", "lora", "prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("rule", list(Rule))
def test_one_member_is_the_plain_request(engine: Engine, name: str, rule: Rule) -> None:
    """Bit for bit, prompts in one chunk and in several."""
    for n in (1, 9, 70):
        prompt = text(n, n)
        engine_alone = [
            generate(engine, [replace(r, salt=f"{r.request_id}")], 60)[0]
            for r in (
                request(prompt, name, temperature=0.5, seed=3),
                Case(((name, 1.0),), rule).request(prompt, temperature=0.5, seed=3),
            )
        ]
        plain, combined = engine_alone
        assert combined.token_ids == plain.token_ids
        assert combined.logprobs == plain.logprobs
        assert all(d.divergence == 0 for d in combined.disagreements)


@pytest.mark.parametrize("rule", list(Rule))
def test_equal_members_are_one(engine: Engine, rule: Rule) -> None:
    prompt = text(8, 33)
    case = Case((("bitdelta", 0.5),) * 2, rule)
    plain, combined = generate(engine, [request(prompt, "bitdelta"), case.request(prompt)], 60)
    assert combined.token_ids == plain.token_ids
    for ours, theirs in zip(combined.logprobs, plain.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert max(d.divergence for d in combined.disagreements) < 1e-8


def test_under_preemption(family: Family) -> None:
    """A cache for hardly more than one of them: they are set back as a whole, and nobody waits
    for ever."""
    cases = list(CASES.values())
    prompts = [text(60 + i, 12 + 5 * i) for i in range(len(cases))]
    plain = [request(text(80 + i, 30), "lora", max_tokens=30) for i in range(3)]
    with loaded(family, kv_cache_bytes=48 * 8 * 512) as engine:
        asked = [c.request(p, max_tokens=25) for c, p in zip(cases, prompts, strict=True)]
        order = [*asked[:4], *plain, *asked[4:]]
        answers = dict(
            zip([r.request_id for r in order], generate(engine, order, 120), strict=True)
        )
        assert engine.stats().preemptions > 3
        assert engine.stats().kv_blocks_used == 0
        for case, prompt, r in zip(cases, prompts, asked, strict=True):
            check(family, case, prompt, answers[r.request_id])
        alone = generate(engine, [replace(r, request_id=f"{r.request_id}-") for r in plain], 60)
    for r, answer in zip(plain, alone, strict=True):
        assert answers[r.request_id].token_ids == answer.token_ids


def test_prefix_hits(family: Family, engine: Engine) -> None:
    """What a member computed is found by itself, by ordinary requests, and by other members."""
    prompt = text(21, 40)
    case = Case((("lora", 1.0), ("bitdelta", 1.0)))
    first, again = (generate(engine, [case.request(prompt)], 60)[0] for _ in range(2))
    assert first.last.usage is not None and again.last.usage is not None
    assert (first.last.usage.prompt_tokens, first.last.usage.cached_tokens) == (80, 0)
    assert again.last.usage.cached_tokens == 2 * 32
    assert again.token_ids == first.token_ids
    check(family, case, prompt, again)
    plain = generate(engine, [request(prompt, "lora")], 60)[0]
    assert plain.last.usage is not None and plain.last.usage.cached_tokens == 32
    other = Case((("lora", 1.0), ("", 1.0)))
    mixed = generate(engine, [other.request(prompt)], 60)[0]
    assert mixed.last.usage is not None and mixed.last.usage.cached_tokens == 32
    check(family, other, prompt, mixed)


@pytest.mark.parametrize("tokens", [24, 256])
def test_scores(family: Family, tokens: int) -> None:
    """Of given continuations, in lockstep over several steps, or all in one."""
    with loaded(family, max_batch_tokens=tokens) as engine:
        asked, wanted = [], []
        for i, case in enumerate(CASES.values()):
            prompt, continuation = text(i, 9 + 4 * i), text(100 + i, 5 + 6 * i)
            own = tuple((m, (*p, *continuation)) for m, p in case.own)
            whole = replace(case, own=own)
            ids = [*prompt, *continuation]
            scored = {"max_tokens": 0, "prompt_logprobs": 1, "score_from": len(prompt)}
            asked.append(whole.request(ids, **scored))
            wanted.append(case.each(family, prompt, continuation))
        answers = generate(engine, asked, 120)
    for case, r, each, answer in zip(CASES.values(), asked, wanted, answers, strict=True):
        combined = case.combined(each)
        assert len(answer.last.prompt_logprobs) == each.shape[1]
        for i, entry in enumerate(answer.last.prompt_logprobs):
            assert entry.token_id == r.prompt_ids[i - each.shape[1]]
            want = combined[i, entry.token_id]
            assert entry.logprob == want or abs(entry.logprob - want) < TOLERANCE
            assert entry.top[0][1] == pytest.approx(combined[i].max(), abs=TOLERANCE)
            told = answer.last.prompt_disagreements[i]
            assert np.abs(np.array(told.logprobs) - each[:, i, entry.token_id]).max() < TOLERANCE
            assert abs(told.divergence - divergence(case, each[:, i])) < TOLERANCE
    assert any(e.logprob == -math.inf for a in answers for e in a.last.prompt_logprobs)
