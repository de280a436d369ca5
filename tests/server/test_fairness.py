"""Nobody gets more than a fair share of the machine at others' cost, and nobody waits for ever."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation

from deltaserve.server.engine import fair_queue
from deltaserve.server.engine.cost import StepLoad
from deltaserve.server.engine.order import FAIR_TURN, PATIENCE
from deltaserve.server.engine.sequence import Sequence


def served(sim: Simulation, flows: dict[tuple[str, str], int], seconds: float) -> Counter[str]:
    """Tokens computed for each flow while all have more than enough to ask."""
    tokens: Counter[str] = Counter()
    for (tenant, adapter), requests in flows.items():
        for _ in range(requests):
            sim.submit(adapter, tenant=tenant, prompt=20, answer=6)
    while sim.now < seconds:
        for part in sim.step().parts:
            tokens[f"{part.sequence.request.tenant}/{part.sequence.label}"] += part.count
    return tokens


def test_two_adapters_share_equally_however_many_requests_they_have() -> None:
    tokens = served(Simulation(), {("", "a"): 300, ("", "b"): 3000}, 12.0)
    assert tokens["/a"] == pytest.approx(tokens["/b"], rel=0.1)


def test_a_tenant_with_many_adapters_gets_no_more_than_one_with_one() -> None:
    flows = {("rich", f"r{i}"): 300 for i in range(6)} | {("poor", "p"): 600}
    sim = Simulation(adapter_bytes=0)
    tokens = served(sim, flows, 12.0)
    rich = [tokens[f"rich/r{i}"] for i in range(6)]
    assert sum(rich) == pytest.approx(tokens["poor/p"], rel=0.15)
    assert max(rich) < 1.4 * min(rich)


def test_tenants_share_before_their_users_do() -> None:
    """Also where all of them ask the same adapter."""
    sim, tokens = Simulation(adapter_bytes=0), Counter[str]()
    for who, users in (("many", 4), ("one", 1)):
        for user in range(users):
            for _ in range(100 if user else 400):  # one of them asks more than its colleagues
                sim.submit("a", tenant=who, user=f"u{user}", prompt=20, answer=6)
    while sim.now < 5.0:
        for part in sim.step().parts:
            request = part.sequence.request
            tokens[f"{request.tenant}/{request.user}"] += part.count
    many = [tokens[f"many/u{i}"] for i in range(4)]
    assert sum(many) == pytest.approx(tokens["one/u0"], rel=0.15)
    assert max(many) < 1.4 * min(many)


def test_bytes_of_an_adapter_are_paid_by_who_asks_for_it() -> None:
    """A flow whose adapter takes long to read gets fewer tokens in the same time."""
    sim = Simulation()
    sim.adapter("big").nbytes = 2 << 30
    sim.adapter("small").nbytes = 1 << 20
    tokens = served(sim, {("", "big"): 400, ("", "small"): 1500}, 40.0)
    assert tokens["/small"] > 1.5 * tokens["/big"] > 0


def test_being_idle_saves_nothing_up() -> None:
    """A has been served for long; B comes, is idle, comes again: it does not drive A out."""
    sim = Simulation()
    sim.submit("b", answer=1)
    for _ in range(400):
        sim.submit("a", prompt=32, answer=8)
    while sim.now < 5.0:
        sim.step()
    tokens = served(sim, {("", "b"): 400}, sim.now + 5.0)
    assert tokens["/a"] == pytest.approx(tokens["/b"], rel=0.2)


def test_one_flow_alone_gets_the_whole_machine() -> None:
    sim = Simulation()
    for _ in range(3):
        sim.submit("a", prompt=200, answer=1)
    while sim.scheduler.waiting:
        assert sim.step().tokens == sim.max_batch_tokens


def test_higher_priorities_go_first_but_nobody_waits_for_ever() -> None:
    sim = Simulation(max_sequences=2)
    low = sim.submit("a", priority=-5)
    last = 0
    while low not in sim.ended:
        while len(sim.scheduler.waiting) < 4:
            sim.submit("b", priority=9, answer=20)
            last += 1
        sim.step()
        assert sim.now < PATIENCE + 60.0, "it starves"
    admitted = sum(s.ticket >= 0 for s in [*sim.ended, *sim.scheduler.running])
    assert sim.first[low] > PATIENCE and admitted > 2 * FAIR_TURN


def test_within_a_flow_higher_priorities_go_first() -> None:
    sim = Simulation(max_sequences=1)
    sim.submit("a", answer=30)
    sim.step()
    low, high = sim.submit("a"), sim.submit("a", priority=1)
    sim.run()
    assert sim.first[high] < sim.first[low]


def test_a_flood_that_fills_the_batch_makes_room_for_another_flow() -> None:
    """Answers of 1000 tokens hold all places: the newcomer does not wait for their end."""
    sim = Simulation(max_sequences=4)
    flood = [sim.submit("hot", answer=1000) for _ in range(20)]
    for _ in range(10):
        sim.step()
    assert len(sim.scheduler.running) == 4
    newcomer = sim.submit("cold")
    assert sim.until(newcomer) < 5 * sim.alone(newcomer, flood[0])
    assert sim.scheduler.preemptions == 1


def test_a_flood_that_fills_the_cache_makes_room_for_another_flow() -> None:
    sim = Simulation(blocks=101, max_sequences=50)
    for _ in range(20):
        sim.submit("hot", prompt=40, answer=100)
    for _ in range(30):
        sim.step()
    assert sim.scheduler.waiting and sim.scheduler.blocks.available < 10
    newcomer = sim.submit("cold", prompt=40)
    assert sim.until(newcomer) < 0.3
    sim.run()


def test_a_small_flow_takes_nothing_from_one_as_small() -> None:
    sim = Simulation(max_sequences=2)
    sim.submit("a", answer=50)
    sim.submit("b", answer=50)
    sim.step()
    sim.submit("c", answer=50)
    sim.run()
    assert sim.scheduler.preemptions == 0


def test_a_long_prompt_leaves_the_next_flow_its_part_of_the_step() -> None:
    sim = Simulation()
    sim.submit("a", prompt=4000)
    sim.step()
    newcomer = sim.submit("b", prompt=60)
    sim.until(newcomer)
    assert sim.steps <= 4


def test_steps_keep_to_the_inter_token_target() -> None:
    free, tied = Simulation(), Simulation(inter_token_target=0.025)
    for sim in (free, tied):
        sim.submit("a", answer=60)
        for _ in range(3):
            sim.step()
        sim.submit("a", prompt=600)
    longest = []
    for sim in (free, tied):
        seconds = []
        while sim.scheduler.waiting or any(not s.decoding for s in sim.scheduler.running):
            before = sim.now
            sim.step()
            seconds.append(sim.now - before)
        longest.append(max(seconds))
    assert longest[1] <= 0.025 < longest[0]


def test_an_impossible_inter_token_target_does_not_stop_prompts() -> None:
    sim = Simulation(inter_token_target=1e-6)
    sim.submit("a", answer=200)
    sim.step()
    sim.until(sim.submit("a", prompt=40))


def test_charges_of_a_step_are_what_it_costs() -> None:
    """Decodes of two flows that share an adapter's bytes, and a third."""
    sim = Simulation()
    for name in ("a", "a", "b", ""):
        sim.submit(name, answer=5)
    sim.step()
    flows = sim.scheduler.queue._tenants[""].flows
    before = {name: flow.time for name, flow in flows.items()}
    began = sim.now
    sim.step()
    charged = {name: flow.time - before[name] for name, flow in flows.items()}
    assert sum(charged.values()) == pytest.approx(sim.now - began)
    bytes_ = sim.cost.per_byte * sim.adapter_bytes
    assert charged["a"] - 2 * charged[""] == pytest.approx(bytes_)
    assert charged["b"] - charged[""] == pytest.approx(bytes_)


def test_what_is_computed_again_is_not_paid_again() -> None:
    once = Simulation()
    once.submit("a", prompt=10, answer=30)
    once.run()
    small = Simulation(blocks=12, max_batch_tokens=5)
    small.scheduler.blocks.prefix_cache = False
    pair = [small.submit(name, prompt=10, answer=30) for name in ("a", "b")]
    paid: Counter[str] = Counter()
    times: Counter[str] = Counter()
    charge = small.scheduler.queue.charge

    def noting(sequence: Sequence, seconds: float) -> None:
        paid[sequence.label] += round(seconds * 1e9)
        charge(sequence, seconds)

    charges = small.cost.charges

    def counting(load: StepLoad, fresh: dict[Sequence, int]) -> dict[Sequence, float]:
        times.update(s.label for s in fresh)
        return charges(load, fresh)

    small.scheduler.queue.charge = noting  # type: ignore[method-assign]
    small.cost.charges = counting  # type: ignore[method-assign]
    small.run()
    assert small.scheduler.preemptions > 0
    per_token = small.cost.per_token * (40 - 1)
    most = per_token + 34 * (small.cost.fixed + small.cost.per_byte * small.adapter_bytes)
    assert all(paid[s.label] / 1e9 <= most * 1.001 for s in pair)
    chunks = -(-10 // 2)  # of a prompt, in steps that two share
    assert all(30 <= n < 30 + chunks for n in times.values()), "no more steps than it would alone"


def test_flows_without_requests_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "MAX_FLOWS", 20)
    sim = Simulation()
    sim.submit("long", answer=1000)
    for i in range(50):
        sim.submit("", tenant=f"t{i}", answer=1, prompt=1)
        sim.step()
    assert len(sim.scheduler.queue._tenants) <= 21


def test_who_becomes_the_first_advances() -> None:
    """Its flow's part of the step is used up by one that a third drives out in the same step."""
    sim = Simulation(blocks=25, block_size=1, max_sequences=2, max_batch_tokens=5)
    sim.submit("a", tenant="t", prompt=12, priority=-1)
    sim.step()
    sim.step()
    new = sim.submit("a", tenant="t", prompt=1)
    other = sim.submit("", prompt=3, priority=-1)
    batch = sim.step()
    assert {part.sequence for part in batch.parts} == {new, other}


request = st.fixed_dictionaries(
    {
        "adapter": st.sampled_from(["", "a", "b"]),
        "tenant": st.sampled_from(["", "t", "u"]),
        "prompt": st.integers(1, 12),
        "answer": st.integers(1, 12),
        "priority": st.integers(-1, 1),
        "at": st.floats(0, 0.5),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(request, min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 8),
)
def test_every_schedule_ends(
    requests: list[dict[str, object]], size: int, sequences: int, spare: int
) -> None:
    """In caches that hold hardly more than one request: each step somebody's work is done for
    good, so there are no more of them than tokens, times those who may lose theirs once each."""
    sim = Simulation(
        blocks=-(-24 // size) + spare + 1,
        block_size=size,
        max_sequences=sequences,
        max_batch_tokens=5,
    )
    asked = [sim.submit(**r) for r in requests]  # type: ignore[arg-type]
    tokens = sum(len(s.request.prompt_ids) + s.request.sampling.max_tokens for s in asked)
    sim.run(most=tokens * (len(asked) + 1) + len(asked))
    assert set(sim.ended) == set(asked) and sim.scheduler.blocks.used == 0
