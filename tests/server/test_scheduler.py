"""The scheduler keeps its budgets, serves everybody, and preempts without losing tokens."""

import random

import pytest

from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.core import Request, SamplingParams
from deltaserve.server.engine.detokenizer import Detokenizer
from deltaserve.server.engine.kv_cache import BlockManager, chain_root
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence, Span


class Nowhere:
    def deliver(self, outputs: object) -> None: ...


def sequence(
    prompt: list[int], max_tokens: int, slot: int = 0, priority: int = 0, name: str = ""
) -> Sequence:
    request = Request(
        name or f"r{random.random()}",
        tuple(prompt),
        SamplingParams(max_tokens=max_tokens),
        priority=priority,
    )
    made = Sequence(request, Nowhere(), (), Detokenizer(None, ()))
    made.spans = (Span(0, ((slot, 1.0),) if slot else ()),)
    return made


def begin(s: Sequence) -> bool:
    s.begin(None, s.spans, chain_root(str(s.spans)))
    return True


def scheduler(blocks: int = 64, size: int = 4, tokens: int = 16, sequences: int = 8) -> Scheduler:
    made = Scheduler(BlockManager(blocks, size), tokens, sequences)
    made.begin = begin
    return made


def run(made: Scheduler, batch: Batch) -> list[Sequence]:
    """What the engine does with a batch: every sampled sequence gets a token."""
    made.advance(batch)
    done = []
    for part in batch.parts:
        s = part.sequence
        if s.computed == len(s.tokens):
            s.tokens.append(7)
            s.outputs += 1
            if s.outputs >= s.request.sampling.max_tokens:
                done.append(s)
    for s in done:
        made.remove(s)
    return done


def test_prompts_are_cut_to_the_budget_and_decodes_go_first() -> None:
    made = scheduler(tokens=10)
    first, second = sequence(list(range(6)), 5), sequence(list(range(50, 75)), 2)
    made.add(first)
    made.add(second)
    batch = made.schedule()
    assert [(p.start, p.count, p.sample) for p in batch.chunks] == [(0, 6, True), (0, 4, False)]
    run(made, batch)
    batch = made.schedule()
    assert [p.sequence for p in batch.decodes] == [first]
    assert [(p.start, p.count) for p in batch.chunks] == [(4, 9)]


def test_parts_are_ordered_by_adapter_the_base_first() -> None:
    made = scheduler(tokens=100)
    for slot in (3, 0, 1, 3, 0):
        made.add(sequence([1, 2, 3], 4, slot))
    batch = made.schedule()
    order = [p.mix for p in batch.chunks]
    assert order == sorted(order) and order[0] == ()
    run(made, batch)
    order = [p.mix for p in made.schedule().decodes]
    assert order == sorted(order)


def test_higher_priority_goes_first() -> None:
    made = scheduler(tokens=4)
    low, high = sequence([1] * 4, 1), sequence([2] * 4, 1, priority=5)
    made.add(low)
    made.add(high)
    assert made.schedule().chunks[0].sequence is high


def test_a_second_request_takes_up_the_cached_prefix() -> None:
    made = scheduler(tokens=100)
    made.add(sequence(list(range(12)), 1))
    run(made, made.schedule())
    same, other = sequence(list(range(12)), 1), sequence(list(range(12)), 1, slot=2)
    made.add(same)
    made.add(other)
    counts = {p.sequence: p.count for p in made.schedule().chunks}
    assert counts == {same: 4, other: 12}  # 11 may be cached, whole blocks are 8


def test_the_last_one_is_preempted_and_computed_anew() -> None:
    made = scheduler(blocks=7, size=2, tokens=100)  # 6 blocks: 12 tokens
    first, second = sequence([1] * 4, 6), sequence([2] * 4, 6)
    made.add(first)
    made.add(second)
    finished: list[Sequence] = []
    for _ in range(40):
        finished += run(made, made.schedule())
    assert finished == [first, second]
    assert made.preemptions > 0
    assert first.outputs == second.outputs == 6
    made.blocks.check_integrity()
    assert made.blocks.used == 0


@pytest.mark.parametrize("seed", range(5))
def test_everybody_is_served_under_random_load(seed: int) -> None:
    rng = random.Random(seed)
    made = scheduler(blocks=rng.randrange(10, 30), size=rng.choice([1, 3, 4]), tokens=9)
    room = made.blocks.total * made.blocks.block_size
    expected, finished = 0, 0
    for turn in range(4000):
        if turn < 300 and rng.random() < 0.3:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, room // 2))]
            answer = rng.randrange(1, max(2, min(20, room - len(prompt))))
            made.add(sequence(prompt, answer, rng.randrange(3), rng.randrange(2)))
            expected += 1
        if made.running and rng.random() < 0.02:
            made.remove(rng.choice(list(made.running)))
            expected -= 1
        batch = made.schedule()
        assert batch.tokens <= max(made.max_batch_tokens, len(made.running))
        assert len(made.running) <= made.max_sequences
        for part in batch.parts:
            held = len(part.sequence.blocks) * made.blocks.block_size
            assert held >= part.start + part.count
        finished += len(run(made, batch))
        made.blocks.check_integrity()
        if turn > 300 and not made.running and not made.waiting:
            break
    assert finished == expected
    assert made.blocks.used == 0
