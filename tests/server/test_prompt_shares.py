"""How a step's prompt tokens are divided, and that a newcomer does not wait for its part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import Simulation

from deltaserve.server.engine.batch import Batch, Scheduled
from deltaserve.server.engine.room import prompt_shares
from deltaserve.server.engine.sequence import Sequence


def begun(sim: Simulation, *asked: tuple[str, str, int]) -> list[Sequence]:
    """Sequences of (tenant, adapter, prompt tokens), laid out."""
    made = [sim.make(adapter, tenant=tenant, prompt=n) for tenant, adapter, n in asked]
    for s in made:
        sim.scheduler.begin(s)
    return made


def computed(batch: Batch, sequence: Sequence) -> int:
    return sum(part.count for part in batch.chunks if part.sequence is sequence)


def test_parts_are_equal_by_tenant_then_by_flow() -> None:
    prompts = begun(Simulation(), ("", "a", 90), ("", "b", 90), ("t", "a", 90), ("t", "a", 90))
    assert [n for _, n in prompt_shares(prompts, None, 120, Batch())] == [30, 30, 60, 0]


def test_what_the_step_computes_already_is_of_the_part() -> None:
    first, again, light = begun(Simulation(), ("", "a", 90), ("", "a", 90), ("", "b", 40))
    batch = Batch(chunks=[Scheduled(first, 0, 60)])
    assert prompt_shares([again], light, 120, batch) == [(again, 20)]
    assert prompt_shares([light], again, 120, batch) == [(light, 40)]


flows = st.tuples(st.sampled_from(["", "t"]), st.sampled_from(["a", "b"]), st.integers(1, 60))


@given(st.lists(flows, min_size=1, max_size=6), st.integers(0, 100), st.integers(0, 100))
def test_shares_keep_to_the_budget_and_leave_the_head_its_part(
    asked: list[tuple[str, str, int]], budget: int, given_already: int
) -> None:
    head, *prompts = begun(Simulation(), *asked)
    batch = Batch()
    if prompts and given_already:
        count = min(given_already, budget, prompts[0].pending)
        batch.chunks.append(Scheduled(prompts[0], 0, count))
        prompts = prompts[1:]
    shares = prompt_shares(prompts, head, budget, batch)
    taken = batch.prompt_tokens + sum(n for _, n in shares)
    assert taken <= budget and all(0 <= n <= s.pending for s, n in shares)
    mine = [s for s in prompts if (s.request.tenant, s.label) == (head.request.tenant, head.label)]
    if not mine and not batch.chunks:  # its tenant's half, of which two flows have a half each
        assert budget - taken >= min(head.pending, budget // 4)


@pytest.mark.parametrize("tenant", ["", "other"])
def test_a_newcomer_takes_part_although_prompts_fill_the_batch(tenant: str) -> None:
    """All places and the whole budget are a flood's."""
    sim = Simulation(max_sequences=4)
    for _ in range(8):
        sim.submit("hot", tenant=tenant, prompt=400)
    sim.step()
    newcomer = sim.submit("cold", prompt=30)
    assert computed(sim.step(), newcomer) == 30


def test_tokens_of_who_is_driven_out_in_the_same_step_are_the_newcomers() -> None:
    """The flood's next request comes into the last place, and gives it up at once."""
    sim = Simulation(max_sequences=4)
    for _ in range(3):
        sim.submit("hot", prompt=16, answer=100)
    sim.step()
    sim.step()
    flows = sim.scheduler.queue._tenants[""].flows
    sim.submit("hot", prompt=50)
    newcomer = sim.submit("cold", prompt=40)
    flows["cold"].time = flows["hot"].time + 1e-3 * sim.cost.per_token  # not quite its turn
    batch = sim.step()
    assert sim.scheduler.preemptions == 1 and computed(batch, newcomer) == 40


def test_a_newcomer_goes_before_who_has_had_a_turn() -> None:
    sim = Simulation(max_sequences=4, adapter_bytes=0)
    for _ in range(3):
        sim.submit("hot", answer=50)
    sim.step()
    waits = sim.submit("hot", prompt=100)
    newcomer = sim.submit("cold", prompt=50)
    batch = sim.step()
    assert newcomer.ticket < 4 and computed(batch, newcomer) == 50
    assert sim.scheduler.preemptions == 0 and waits in sim.scheduler.queue


def test_what_the_next_one_leaves_is_not_lost() -> None:
    """Each step is full while prompts wait."""
    sim = Simulation(max_sequences=8)
    for i in range(8):
        sim.submit("abc"[i % 3], prompt=100)
    for _ in range(8):
        assert sim.step().tokens >= sim.max_batch_tokens - 2
