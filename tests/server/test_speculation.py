"""Scheduler, verification and prefix index with drafts, over a model that is a list of tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.server.engine.batch import Batch, Scheduled
from deltaserve.server.engine.core import Output, Request, SamplingParams, Speculation
from deltaserve.server.engine.cost import FIXED_TOKENS, CostModel
from deltaserve.server.engine.detokenizer import Detokenizer
from deltaserve.server.engine.kv_cache import BlockManager, chain, chain_root
from deltaserve.server.engine.outcome import StepOutputs
from deltaserve.server.engine.prompt_lookup import Drafter
from deltaserve.server.engine.runner import LogitRow
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence, Span
from deltaserve.server.engine.speculation import FEWEST_ROWS, MOST_ROWS, Speculator

VOCAB = 8
ROOT = chain_root("model")


class Mailbox:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.tokens += output.token_ids


@dataclass
class World:
    """Every sequence says what `truth` has at the place behind each token; behind a wrong draft it
    says something else."""

    scheduler: Scheduler
    truth: dict[Sequence, list[int]]
    drafted: int = 0
    accepted: int = 0

    def add(self, prompt: list[int], answer: list[int], draft_tokens: int, slot: int) -> Sequence:
        asked = Request(
            f"r{len(self.truth)}",
            tuple(prompt),
            SamplingParams(max_tokens=len(answer)),
            speculation=Speculation(draft_tokens, 1, 3),
        )
        assert self.scheduler.speculator is not None
        drafter = self.scheduler.speculator.drafter(asked)
        made = Sequence(asked, Mailbox(), (), Detokenizer(None, ()), None, drafter)
        made.spans = (Span(0, ((slot, 1.0),) if slot else ()),)
        self.truth[made] = [*prompt, *answer]
        self.scheduler.add(made)
        return made

    def step(self) -> None:
        batch = self.scheduler.schedule()
        assert batch.tokens <= self.scheduler.max_batch_tokens
        rows = [LogitRow(p, p.start + p.count - 1) for p in batch.parts if p.sample]
        logits = torch.zeros(len(rows), VOCAB)
        for i, row in enumerate(rows):
            logits[i, self._says(batch, row)] = 1.0
        held = {p.sequence: len(p.sequence.tokens) for p in batch.parts}
        out = StepOutputs()
        out.advance(batch, rows, logits, self.scheduler, frozenset(), 1000)
        for sequence, output in out.finished:
            self.scheduler.remove(sequence)
            out.add(sequence, output)
        out.deliver()
        self._count(batch, held)
        self._check()

    def _says(self, batch: Batch, row: LogitRow) -> int:
        sequence, truth = row.part.sequence, self.truth[row.part.sequence]
        drafts = [p for p in batch.decodes if p.sequence is sequence and p.draft is not None]
        for part in drafts:
            assert len(sequence.tokens) <= part.start < len(sequence.blocks) * self.size
        wrong = any(p.draft != truth[p.start] for p in drafts if p.start <= row.position)
        return (truth[row.position + 1] + wrong) % VOCAB

    def _count(self, batch: Batch, held: dict[Sequence, int]) -> None:
        for sequence, before in held.items():
            drafts = [p for p in batch.decodes if p.sequence is sequence and p.draft is not None]
            self.drafted += len(drafts)
            self.accepted += max(0, len(sequence.tokens) - before - 1)
            if drafts and sequence in self.scheduler.running:  # it holds what it would without
                assert len(sequence.blocks) == -(-sequence.computed // self.size)

    def _check(self) -> None:
        self.scheduler.blocks.check_integrity()
        for sequence, truth in self.truth.items():
            assert sequence.tokens == truth[: len(sequence.tokens)]
            assert sequence.computed <= max(0, len(sequence.tokens) - 1)
            assert len(sequence.hashes) <= sequence.computed // self.size
            parent = ROOT
            for i, found in enumerate(sequence.hashes):
                parent = chain(parent, i, truth[i * self.size : (i + 1) * self.size], {})
                assert found == parent

    @property
    def size(self) -> int:
        return self.scheduler.blocks.block_size


def world(blocks: int, size: int, tokens: int, sequences: int, prefix_cache: bool) -> World:
    manager = BlockManager(blocks, size, prefix_cache=prefix_cache)
    made = Scheduler(manager, tokens, sequences)

    def begin(sequence: Sequence) -> bool:
        sequence.begin(None, sequence.spans, ROOT)
        return True

    made.begin = begin
    made.speculator = Speculator(manager, CostModel(0), 1000)
    return World(made, {})


def tokens(generator: random.Random, count: int, period: int, noise: float) -> list[int]:
    pattern = [generator.randrange(VOCAB) for _ in range(period)]
    return [
        generator.randrange(VOCAB) if generator.random() < noise else pattern[i % period]
        for i in range(count)
    ]


@given(
    seed=st.integers(0, 1 << 20),
    size=st.integers(1, 6),
    room=st.integers(30, 90),
    budget=st.integers(1, 40),
    sequences=st.integers(1, 6),
    count=st.integers(1, 7),
    prefix_cache=st.booleans(),
)
def test_policy_answers_are_exact_and_nothing_is_lost(
    seed: int,
    size: int,
    room: int,
    budget: int,
    sequences: int,
    count: int,
    prefix_cache: bool,
) -> None:
    generator = random.Random(seed)
    made = world(room // size + 1, size, max(budget, sequences), sequences, prefix_cache)
    most = room // size * size
    for _ in range(count):
        text = tokens(generator, most, generator.randrange(1, 7), generator.choice([0, 0.1, 0.5]))
        prompt = generator.randrange(1, most // 2)
        end = generator.randrange(prompt + 1, most + 1)
        made.add(text[:prompt], text[prompt:end], generator.randrange(9), generator.randrange(3))
    for _ in range(200 * most):
        if not (made.scheduler.running or made.scheduler.waiting):
            break
        made.step()
    for sequence, truth in made.truth.items():
        assert isinstance(sequence.outbox, Mailbox)
        assert sequence.outbox.tokens == truth[len(sequence.request.prompt_ids) :]
    assert made.scheduler.blocks.used == 0
    counted = [s.drafter for s in made.truth if s.drafter is not None]
    assert (made.drafted, made.accepted) == (
        sum(d.drafted for d in counted),
        sum(d.accepted for d in counted),
    )


def test_policy_drafts_save_steps() -> None:
    made = world(64, 4, 64, 4, True)
    for slot in range(3):
        made.add([1, 2, 3] * 4, [1, 2, 3] * 20, 8, slot)
    steps = 0
    while made.scheduler.running or made.scheduler.waiting:
        made.step()
        steps += 1
    assert steps < 25  # 60 tokens each


class Sure(Drafter):
    """Drafts with the probabilities given, whatever the tokens."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__(32, 1, 1)
        self._probabilities = probabilities

    def draft(self, tokens: object, most: int):  # type: ignore[no-untyped-def]
        return [(7, p) for p in self._probabilities[:most]]


def decoding(manager: BlockManager, drafter: Drafter | None, tokens: int = 5) -> Sequence:
    asked = Request("r", (1,) * tokens, SamplingParams(max_tokens=100))
    made = Sequence(asked, Mailbox(), (), Detokenizer(None, ()), None, drafter)
    made.begin(None, made.spans, ROOT)
    made.tokens.append(2)
    made.outputs, made.computed = 1, tokens
    made.blocks = [manager.take() for _ in range(-(-(tokens + 1) // manager.block_size))]
    return made


def extended(
    probabilities: list[list[float]],
    budget: int = 100,
    others: int = 0,
    chunk: int = 0,
    cost: CostModel | None = None,
) -> list[int]:
    """How many drafts each of these sequences gets, beside others that draft nothing."""
    manager = BlockManager(1000, 4)
    drafting = [decoding(manager, Sure(p)) for p in probabilities]
    all_of = [*drafting, *(decoding(manager, None) for _ in range(others))]
    batch = Batch([Scheduled(s, s.computed, 1) for s in all_of])
    if chunk:
        batch.chunks.append(Scheduled(decoding(manager, None, 2 * chunk), 0, chunk))
    Speculator(manager, cost or CostModel(0), 1000).extend(batch, budget)
    drafts = [p for p in batch.decodes if p.draft is not None]
    for s in drafting:
        places = [p.start for p in drafts if p.sequence is s]
        assert places == list(range(s.computed + 1, s.computed + 1 + len(places)))
    return [sum(p.sequence is s for p in drafts) for s in drafting]


def test_policy_likely_drafts_go_first_and_within_the_budget() -> None:
    assert extended([[0.9, 0.8, 0.3], [0.95, 0.85, 0.7]], budget=4) == [2, 2]
    assert extended([[0.9, 0.8, 0.3], [0.95, 0.85, 0.7]], budget=1) == [0, 1]
    assert extended([[0.99] * 5], budget=0) == [0]


def test_policy_a_draft_must_be_worth_its_row() -> None:
    """One sequence alone: 1 token in the time of its row and of the fixed ones."""
    worth = 1 / (1 + FIXED_TOKENS)
    assert extended([[worth * 1.01]]) == [1]
    assert extended([[worth * 0.99]]) == [0]
    # a full batch makes about as many tokens as rows: only what is certain is worth more
    assert extended([[0.93] * 8], others=255) == [0]
    assert extended([[0.99] * 8], others=255) == [8]
    # beside a long prompt a decode is slow, and a draft costs little of it
    assert extended([[0.1] * 3], chunk=200) == [3]


def test_policy_the_rows_worth_is_measured() -> None:
    """A step of n rows takes 1 + n / fixed seconds."""
    for fixed in (4.0, 40.0):
        cost = CostModel(1 << 30)
        for n in [1, 30, 2, 60, 8] * 40:
            cost.observe(n, 0, 1 + n / fixed)
        worth = 1 / (1 + fixed)
        assert extended([[worth * 1.05]], cost=cost) == [1]
        assert extended([[worth * 0.95]], cost=cost) == [0]


def test_policy_nonsense_that_is_measured_is_bounded() -> None:
    for seconds, rows in ((lambda n: 1.0, MOST_ROWS), (lambda n: float(n), FEWEST_ROWS)):
        cost = CostModel(1 << 30)
        for n in [1, 30, 2, 60, 8] * 40:
            cost.observe(n, 0, seconds(n))
        worth = 1 / (1 + rows)
        assert extended([[worth * 1.01]], cost=cost) == [1]
        assert extended([[worth * 0.99]], cost=cost) == [0]


def test_policy_drafts_at_most_double_a_step() -> None:
    assert extended([[0.999] * 32]) == [1 + FIXED_TOKENS]


def test_policy_drafts_take_no_block_that_is_missing() -> None:
    manager = BlockManager(4, 4)
    s = decoding(manager, Sure([0.99] * 8))  # 6 tokens in 2 of 3 blocks
    batch = Batch([Scheduled(s, s.computed, 1)])
    manager.take()
    Speculator(manager, CostModel(0), 1000).extend(batch, 100)
    assert [p.start for p in batch.decodes] == [5, 6, 7]
    assert manager.available == 0


def test_policy_the_answers_end_is_the_drafts_end() -> None:
    for most, limit, expected in ((100, 1000, 8), (4, 1000, 2), (100, 9, 2), (2, 1000, 0)):
        manager = BlockManager(64, 4)
        s = decoding(manager, Sure([0.99] * 8))  # one output so far
        s.request = Request("r", s.request.prompt_ids, SamplingParams(max_tokens=most))
        batch = Batch([Scheduled(s, s.computed, 1)])
        Speculator(manager, CostModel(0), limit).extend(batch, 100)
        assert len(batch.decodes) == 1 + expected
