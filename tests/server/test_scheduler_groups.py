"""Members of a combination are scheduled as one request, whatever else goes on, and end."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings, target
from hypothesis import strategies as st

from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.core import Combination, Member, Request, SamplingParams
from deltaserve.server.engine.detokenizer import Detokenizer
from deltaserve.server.engine.group import Group, members
from deltaserve.server.engine.kv_cache import BlockManager, chain_root
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence, Span

SIZE, SEQUENCES = 2, 6
MAX_STEPS = 600


class Nowhere:
    def deliver(self, outputs: object) -> None: ...


@dataclass(frozen=True)
class Asked:
    """prompts: of the members; one for an ordinary request. score: tokens at the end of each that
    are scored, 0 to generate."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: int
    score: int
    priority: int
    step: int

    def sequence(self, name: str) -> Sequence:
        prompts = [p + tuple(range(self.score)) for p in self.prompts]
        combination = Combination(tuple(Member(prompt_ids=p) for p in prompts))
        request = Request(
            name,
            prompts[0],
            SamplingParams(
                max_tokens=0 if self.score else self.tokens,
                score_from=len(self.prompts[0]) if self.score else None,
            ),
            priority=self.priority,
            combination=combination if len(prompts) > 1 else None,
        )
        made = []
        for i, one in enumerate(members(request)):
            made.append(Sequence(one, Nowhere(), (), Detokenizer(None, ())))
            made[-1].spans = (Span(0, ((i, 1.0),) if i else ()),)
        if request.combination is not None:
            group = Group(request.combination, tuple(made))
            for sequence in made:
                sequence.group = group
        return made[0]


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    count = draw(st.sampled_from([1, 1, 2, 3, 4]))
    prompts = tuple(tuple(range(draw(st.integers(1, 14)))) for _ in range(count))
    score = draw(st.sampled_from([0, 0, 1, 6]))
    return Asked(
        prompts, draw(st.integers(1, 12)), score, draw(st.integers(0, 2)), draw(st.integers(0, 20))
    )


def begin(lead: Sequence) -> bool:
    for member in lead.members:
        member.begin(None, member.spans, chain_root(str(member.spans)))
    return True


def check(made: Scheduler, batch: Batch) -> None:
    """What must hold of every step."""
    held = [m for lead in made.running for m in lead.members]
    assert len(held) <= SEQUENCES
    assert not any(m.blocks or m.computed for lead in made.waiting for m in lead.members)
    at = {m: m.computed for m in held}
    for part in sorted(batch.parts, key=lambda p: p.start):
        assert at[part.sequence] == part.start  # nothing left out, nothing twice
        at[part.sequence] += part.count
        assert len(part.sequence.blocks) * SIZE >= at[part.sequence]
    for lead in made.running:
        rows = [
            {len(m.tokens) - i for i in range(m.computed, at[m]) if len(m.tokens) - i <= m.tail}
            for m in lead.members
        ]
        assert all(r == rows[0] for r in rows)  # what is combined is in one step


def run(made: Scheduler, batch: Batch) -> list[Sequence]:
    """What the engine does with a batch."""
    made.advance(batch)
    sampled = {p.sequence for p in batch.parts if p.sequence.computed == len(p.sequence.tokens)}
    done = []
    for lead in dict.fromkeys(s.lead for s in sampled):
        assert sampled >= set(lead.members)
        limit = lead.request.sampling.max_tokens
        for member in lead.members:
            member.tokens.append(7)
            member.outputs += 1
        if lead.outputs >= limit:
            done.append(lead)
    for lead in done:
        made.remove(lead)
    return done


@settings(max_examples=150, deadline=None)
@given(
    st.lists(requests(), min_size=2, max_size=12),
    st.sampled_from([3, 8, 16]),
    st.integers(12, 60),
    st.booleans(),
)
def test_groups_run_as_one_and_end(
    asked: list[Asked], budget: int, blocks: int, cached: bool
) -> None:
    made = Scheduler(BlockManager(blocks + 1, SIZE, prefix_cache=cached), budget, SEQUENCES)
    made.begin = begin
    arriving = {i: one.sequence(f"r{i}") for i, one in enumerate(asked)}
    fitting = {
        i: one
        for i, one in enumerate(asked)
        if sum(-(-(len(p) + max(one.score, one.tokens)) // SIZE) for p in one.prompts) <= blocks
    }
    ended: set[str] = set()
    for step in range(MAX_STEPS):
        for i, one in fitting.items():
            if one.step == step:
                made.add(arriving[i])
        batch = made.schedule()
        check(made, batch)
        assert batch or not (made.waiting or made.running)
        ended |= {lead.id for lead in run(made, batch)}
        if step > 20 and not (made.waiting or made.running):
            break
    target(made.preemptions)
    assert ended == {f"r{i}" for i in fitting}
    assert made.blocks.used == 0
    made.blocks.check_integrity()


def test_a_group_that_has_its_rows_already_is_set_back_as_a_whole() -> None:
    """The first in order takes its blocks from a group that was given this step's rows before."""
    for room in range(11, 18):
        made = Scheduler(BlockManager(room + 1, SIZE), 6, SEQUENCES)
        made.begin = begin
        group = Asked(((1, 2), (3, 4), (5,)), 5, 0, 0, 0).sequence("group")
        made.add(group)
        others = [Asked((tuple(range(13)),), 2, 0, 1, 0).sequence(f"r{i}") for i in range(2)]
        done: list[Sequence] = []
        set_back = 0
        for step in range(80):
            if step in (2, 4):
                made.add(others[step // 2 - 1])
            before = group.decoding and group in made.running
            batch = made.schedule()
            set_back += before and group not in made.running
            check(made, batch)
            done += run(made, batch)
        assert {s.id for s in done} == {"group", "r0", "r1"}
        if set_back:
            return
    raise AssertionError("the group was never set back")
