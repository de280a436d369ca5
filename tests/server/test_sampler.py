"""Tokens are drawn as the parameters say, and from the request's own generator alone."""

import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import (
    ExponentialDecayLengthPenalty,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from deltaserve.server.engine.core import SamplingParams
from deltaserve.server.engine.draw import draw, truncate
from deltaserve.server.engine.sampler import Asked, Row, adjust, logprobs_of, sample


def row(seed: int | None = None, outputs: list[int] | None = None, **fields: object) -> Row:
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return Row(SamplingParams(**fields), generator, (1, 2), outputs or [], (0,))  # type: ignore[arg-type]


def test_greedy_is_argmax_and_leaves_the_logits_alone() -> None:
    logits = torch.randn(4, 50)
    before = logits.clone()
    rows = [row(), row(0, temperature=1.0), row(logit_bias=((7, 100.0),)), row()]
    choices = sample(logits, rows)
    assert choices[0].token_id == int(logits[0].argmax())
    assert choices[2].token_id == 7
    assert torch.equal(logits, before)


def test_a_seed_fixes_the_draws_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(5, 100)
    alone = [sample(logits[2:3], [row(5, temperature=1.0)])[0].token_id for _ in range(3)]
    assert len(set(alone)) == 1
    others = [row(i, temperature=2.0) for i in range(5)]
    others[2] = row(5, temperature=1.0)
    assert sample(logits, others)[2].token_id == alone[0]


def test_rows_are_drawn_alike_alone_and_together() -> None:
    """Of equal logits too, whichever of them a sort puts first; with more rows than are drawn at
    once, and a row of another number drawing another token."""
    logits = (torch.randn(40, 3000) * 2).round()
    kinds: list[dict[str, float]] = [
        {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_p": 1e-9},
    ]  # fmt: skip
    how = [
        SamplingParams(temperature=0.5 + i / 40, **kinds[i % 5])  # type: ignore[arg-type]
        for i in range(40)
    ]
    numbers = torch.rand(40, dtype=torch.float64).tolist()
    together = draw(logits, how, numbers).tolist()
    for i, (p, number) in enumerate(zip(how, numbers, strict=True)):
        assert draw(logits[i : i + 1], [p], [number]).tolist() == [together[i]]
        kept = truncate(torch.softmax(logits[i : i + 1] / p.temperature, -1), [p])[0].double()
        before, own = kept[: together[i]].sum(), kept[together[i]]
        assert own > 0 and before - 1e-9 <= number * kept.sum() <= before + own + 1e-9
    assert draw(logits, how, [0.999] * 40).tolist() != together
    impossible = torch.tensor([[-torch.inf, 1.0, -torch.inf]]).expand(2, 3)
    assert draw(impossible, how[:2], [0.0, 1 - 2**-53]).tolist() == [1, 1]
    best = torch.tensor(together[4::5])[:, None]
    assert torch.equal(logits[4::5].amax(-1), logits[4::5].gather(1, best)[:, 0])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    sampled = row(3, temperature=0.7)
    n = 4000
    counts = torch.zeros(4)
    for _ in range(n):
        counts[sample(logits[None], [sampled])[0].token_id] += 1
    expected = torch.softmax(logits / 0.7, -1)
    # five standard deviations of a binomial count
    assert ((counts / n - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_truncation() -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])

    def kept(**fields: float) -> list[bool]:
        how = SamplingParams(**fields)  # type: ignore[arg-type]
        return (truncate(p[None], [how])[0] > 0).tolist()

    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False, False]
    assert kept(top_p=0.5) == [True, False, False, False, False]
    assert kept(top_p=1e-6) == [True, False, False, False, False]
    assert kept(min_p=0.3) == [True, True, True, False, False]
    # top_p is a share of what top_k left: 0.7 of 0.85
    assert kept(top_k=3, top_p=0.8) == [True, True, False, False, False]
    assert kept(top_k=3, top_p=0.83) == [True, True, True, False, False]


@pytest.mark.parametrize("spread", [0.1, 3.0, 6.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9), (0, 0.9999), (40, 1.0), (3000, 0.7), (10**6, 0.5)]
)
def test_truncation_of_a_large_vocabulary(spread: float, top_k: int, top_p: float) -> None:
    """As all of it in order says, in float64: whether few tokens hold enough or not."""
    p = torch.softmax(torch.randn(6000) * spread, -1)
    asked = SamplingParams(top_k=top_k, top_p=top_p)
    others = [SamplingParams(), SamplingParams(top_p=0.99999), SamplingParams(top_k=2, min_p=0.1)]
    beside = torch.softmax(torch.randn(3, 6000), -1)
    found = truncate(torch.stack((*beside, p)), [*others, asked])[3]
    ordered, ids = p.double().sort(descending=True)
    if top_k:
        ordered[top_k:] = 0
    before, share = ordered.cumsum(-1) - ordered, top_p * ordered.sum()
    wanted = (ordered > 0) & ((before < share) | (top_p == 1))
    certain = ((before - share).abs() > 1e-5) | (top_p == 1)
    assert torch.equal((found[ids] > 0)[certain], wanted[certain])
    kept = found > 0
    assert torch.equal(found[kept], p[kept]) and not found[~kept].any()


def test_penalties() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 4.0, 3.0])
    got = adjust(logits.clone(), row(outputs=[3, 3, 4], repetition_penalty=2.0))
    assert got.tolist() == [2.0, -4.0, 0.5, 2.0, 1.5]  # prompt ids 1 and 2, outputs 3 and 4
    got = adjust(
        logits.clone(), row(outputs=[3, 3, 4], presence_penalty=1.0, frequency_penalty=0.5)
    )
    assert got.tolist() == [2.0, -2.0, 1.0, 2.0, 1.5]


def test_min_tokens_hold_back_the_end() -> None:
    logits = torch.tensor([9.0, 1.0, 2.0])
    assert sample(logits[None], [row(min_tokens=2)])[0].token_id == 2
    assert sample(logits[None], [row(outputs=[1, 1], min_tokens=2)])[0].token_id == 0


def test_bad_sequences_are_those_of_transformers() -> None:
    draw = random.Random(7)
    excluded = 0
    for _ in range(300):
        vocabulary = draw.choice([3, 12])
        bad = [
            [draw.randrange(vocabulary) for _ in range(draw.randint(1, 4))]
            for _ in range(draw.randint(1, 6))
        ]
        prompt = tuple(draw.randrange(vocabulary) for _ in range(draw.randint(1, 5)))
        outputs = [draw.randrange(vocabulary) for _ in range(draw.randint(0, 5))]
        logits = torch.randn(vocabulary)
        theirs = NoBadWordsLogitsProcessor(bad, eos_token_id=vocabulary)(
            torch.tensor([[*prompt, *outputs]]), logits[None].clone()
        )[0]
        asked = SamplingParams(bad_tokens=tuple(map(tuple, bad)))
        ours = adjust(logits.clone(), Row(asked, None, prompt, outputs))
        assert torch.equal(ours, theirs)
        excluded += int((ours != logits).sum())
    assert excluded > 100


def test_biases_penalties_and_minimum_are_those_of_transformers() -> None:
    draw = random.Random(11)
    for _ in range(200):
        size = 12
        prompt = tuple(draw.randrange(size) for _ in range(draw.randint(1, 5)))
        outputs = [draw.randrange(size) for _ in range(draw.randint(0, 5))]
        bias = {(draw.randrange(size),): draw.uniform(-5, 5) for _ in range(3)}
        penalty, least = draw.uniform(0.5, 2), draw.randint(0, 6)
        ends = [draw.randrange(size), draw.randrange(size)]
        logits = torch.randn(1, size)
        ids = torch.tensor([[*prompt, *outputs]])
        theirs = SequenceBiasLogitsProcessor({k: float(v) for k, v in bias.items()})(ids, logits)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, theirs)
        theirs = MinNewTokensLengthLogitsProcessor(len(prompt), least, ends)(ids, theirs)
        asked = SamplingParams(
            logit_bias=tuple((i, v) for (i,), v in bias.items()),
            repetition_penalty=penalty,
            min_tokens=least,
            stop_token_ids=(ends[1],),
        )
        ours = adjust(logits[0].clone(), Row(asked, None, prompt, outputs, (ends[0],)))
        torch.testing.assert_close(ours, theirs[0])


def test_nothing_left_to_choose_is_a_dead_end() -> None:
    logits = torch.randn(3, 4)
    every = tuple((i,) for i in range(4))
    for temperature in (0.0, 1.0):
        choices = sample(logits, [row(), row(1, temperature=temperature, bad_tokens=every), row()])
        assert [c is not None and c.sound for c in choices] == [True, False, True]
        assert choices[1] is not None and choices[1].dead


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(30)
    chosen = sample(logits[None], [row(1, temperature=0.5, logprobs=3, top_k=1)])[0]
    expected = torch.log_softmax(logits.double(), -1)
    assert chosen.logprob is not None
    assert abs(chosen.logprob.logprob - expected.max().item()) < 1e-5
    assert [i for i, _ in chosen.logprob.top] == logits.topk(3).indices.tolist()
    assert logprobs_of(logits[None], {0: Asked(4, 0, False)})[0].top == ()


def test_logprobs_of_many_rows() -> None:
    """More than are computed at once, each with what it asks for."""
    logits = torch.randn(70, 30)
    logits[5, 3] = -torch.inf
    asked = {i: Asked(i % 30, i % 5, i % 2 == 0) for i in range(69) if i % 7}
    asked[5] = Asked(3, 40, True)
    expected = torch.log_softmax(logits.double(), -1)
    found = logprobs_of(logits, asked)
    assert found.keys() == asked.keys()
    for i, own in asked.items():
        told, order = found[i], expected[i].sort(descending=True)
        finite = int(order.values.isfinite().sum())
        assert told.token_id == own.token_id
        assert [t for t, _ in told.top] == order.indices.tolist()[: min(own.top, finite)]
        assert told.rank == (1 + int((expected[i] > expected[i, own.token_id]).sum())) * own.rank
        near = [v for _, v in told.top] + ([told.logprob] if i != 5 else [])
        wanted = order.values.tolist()[: len(told.top)]
        wanted += [float(expected[i, own.token_id])] if i != 5 else []
        assert torch.allclose(torch.tensor(near), torch.tensor(wanted), atol=1e-5)
    assert found[5].logprob == -math.inf and len(found[5].top) == 29
    assert not logprobs_of(logits, {})


def test_ranks_are_told_if_they_are_asked_for() -> None:
    logits = torch.randn(30)
    logits[7] = logits[3]  # they share a rank
    order = logits.sort(descending=True).values.tolist()
    for token in (3, 7, 12):
        rank = 1 + order.index(float(logits[token]))
        bias = ((token, 100.0),)
        asked, left = (row(logprobs=0, ranks=r, logit_bias=bias) for r in (True, False))
        ranks = [c.logprob.rank for c in sample(logits.expand(2, -1), [asked, left])]
        assert ranks == [rank, 0]


def test_rows_that_are_not_finite_are_named() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    logits[2, 0] = float("inf")
    assert [c.finite for c in sample(logits, [row(), row(1, temperature=1.0), row()])] == [
        True,
        False,
        False,
    ]


def test_the_ramp_of_the_end_rises_with_every_output() -> None:
    logits = torch.randn(20)
    for outputs in ([], [5], [5, 6, 7]):
        found = adjust(logits.clone(), row(outputs=outputs, eos_ramp=0.5))
        wanted = logits.clone()
        wanted[0] += 0.5 * len(outputs)
        assert torch.equal(found, wanted)


def lengthened(count: int, start: int, factor: float) -> Row:
    outputs = [5, 6, 7, 8, 9] * 200
    return replace(row(outputs=outputs[:count], length_penalty=(start, factor)), eos=(0, 7))


@pytest.mark.parametrize(("start", "factor"), [(0, 1.5), (2, 1.01), (2, 10.0), (3, 2.0)])
def test_the_length_penalty_is_that_of_transformers(start: int, factor: float) -> None:
    logits = torch.randn(20)
    theirs = ExponentialDecayLengthPenalty((start, factor), [0, 7], input_ids_seq_length=2)
    for count in range(6):
        found = adjust(logits.clone(), lengthened(count, start, factor))
        ids = torch.zeros(1, 2 + count, dtype=torch.int64)
        torch.testing.assert_close(found, theirs(ids, logits[None].clone())[0])


def test_no_length_makes_a_logit_that_is_no_number() -> None:
    logits = torch.randn(20)
    logits[7] = -torch.inf
    found = adjust(logits.clone(), lengthened(1000, 0, 10.0))
    assert found[0].isfinite() and found[0] > 1e20 and found[7] == -torch.inf


def test_the_length_penalty_ends_a_greedy_answer() -> None:
    logits = torch.zeros(1, 20)
    logits[0, 0], logits[0, 4] = 1.0, 2.0
    tokens: list[int] = []
    while not tokens or tokens[-1] != 0:
        (choice,) = sample(logits, [row(outputs=tokens, length_penalty=(2, 1.5))])
        assert choice is not None
        tokens.append(choice.token_id)
    assert tokens == [4, 4, 4, 4, 0]


def test_the_ramp_ends_a_greedy_answer() -> None:
    """It is no plain row, from the second token on."""
    logits = torch.zeros(1, 20)
    logits[0, 4] = 2.0
    tokens: list[int] = []
    while not tokens or tokens[-1] != 0:
        (choice,) = sample(logits, [row(outputs=tokens, eos_ramp=0.6)])
        assert choice is not None
        tokens.append(choice.token_id)
    assert tokens == [4, 4, 4, 4, 0]
