"""Who is turned away when too many wait, and what is said about how long it would take."""

import random

import pytest
from simulation import Simulation

from deltaserve.server.engine.backlog import Backlog
from deltaserve.server.engine.intake import Intake
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.errors import Overloaded


class Door:
    """A simulation whose requests come in as the engine's do."""

    def __init__(self, most: int = 10**6, per_flow: int | None = None, **how: int) -> None:
        self.sim = Simulation(**how)  # type: ignore[arg-type]
        self.backlog = Backlog(most, per_flow)
        self.intake = Intake(self.backlog, self.sim.scheduler)
        self.inside: set[Sequence] = set()
        self.gone: list[tuple[Sequence, Overloaded]] = []

    def come(self, adapter: str = "", **how: object) -> Sequence:
        made = self.sim.make(adapter, **how)  # type: ignore[arg-type]
        victim = self.intake.enter(made, len(self.inside))
        self.inside.add(made)
        if victim is not None:
            self.gone.append(victim)
            self.inside.remove(victim[0])
            self.sim.scheduler.remove(victim[0])
        self.sim.scheduler.add(made)
        return made

    def step(self) -> None:
        for part in self.sim.step().parts:
            self.intake.leave(part.sequence)
        self.inside -= set(self.sim.ended)


def test_a_full_queue_sheds_the_largest_flow_not_the_newcomer() -> None:
    door = Door(10)
    flood = [door.come("hot") for _ in range(10)]
    newcomers = [door.come("cold") for _ in range(4)]
    assert [s for s, _ in door.gone] == flood[:-5:-1], "the last ones go first"
    error = door.gone[0][1]
    assert error.reason == "displaced" and "the last one for hot gave way" in str(error)
    with pytest.raises(Overloaded, match="10 requests wait or run, the limit is 10") as caught:
        door.come("hot")
    assert caught.value.reason == "queue_full"
    with pytest.raises(Overloaded):  # six and four; with one more it would have five
        for _ in range(2):
            door.come("cold")
    assert all(s in door.inside for s in newcomers)


def test_it_is_the_largest_tenant_that_is_shed() -> None:
    """Not one with fewer requests for more adapters."""
    door = Door(12)
    many = [door.come(f"m{i % 4}", tenant="many") for i in range(8)]
    for _ in range(4):
        door.come("hot", tenant="one")
    door.come("x", tenant="third")
    assert door.gone[0][0] in many
    door.come("m9", tenant="many")
    assert door.gone[1][0] in many, "its own, for another adapter"


def test_low_priorities_are_shed_first() -> None:
    door = Door(10)
    low = door.come("cold", priority=-1)
    for _ in range(9):
        door.come("hot")
    door.come("hot", priority=0)
    assert [s for s, _ in door.gone] == [low]
    with pytest.raises(Overloaded):
        door.come("rare", priority=-2)


def test_those_that_run_are_not_shed() -> None:
    door = Door(6, max_sequences=8)
    for _ in range(6):
        door.come("hot", prompt=4, answer=100)
    door.step()
    with pytest.raises(Overloaded):
        door.come("cold")
    assert not door.gone


def test_a_flow_has_a_limit_of_its_own() -> None:
    door = Door(per_flow=3)
    for _ in range(3):
        door.come("hot", tenant="t")
    with pytest.raises(Overloaded, match=r"3 requests of 't' for hot wait, the limit is 3") as e:
        door.come("hot", tenant="t")
    assert e.value.reason == "flow_full" and e.value.retry_after is not None
    door.come("hot", tenant="u")
    door.come("cold", tenant="t")
    door.step()
    door.come("hot", tenant="t")


def test_what_does_not_wait_any_more_is_forgotten() -> None:
    door = Door()
    for i in range(5):
        door.come(f"a{i}", answer=2)
    while door.inside:
        door.step()
    assert len(door.backlog) == 0 and not door.backlog._flows


@pytest.mark.parametrize("seed", range(6))
def test_the_wait_is_foretold(seed: int) -> None:
    """For a newcomer behind whatever waits and runs, within a factor of two and two steps."""
    rng = random.Random(seed)
    door = Door(max_sequences=rng.choice([4, 16]))
    for _ in range(rng.randint(0, 40)):
        adapter, tenant = rng.choice(["", "a", "b"]), rng.choice(["", "t"])
        door.come(
            adapter, tenant=tenant, prompt=rng.randint(4, 60), answer=16, priority=rng.randint(0, 1)
        )
    for _ in range(rng.randint(0, 6)):
        door.step()
    newcomer = door.sim.make(rng.choice(["a", "c"]), tenant="t", prompt=24, answer=16)
    foretold = door.intake.expected(newcomer)
    door.sim.scheduler.add(newcomer)
    waited = door.sim.until(newcomer)
    step = door.sim.cost.seconds(door.sim.max_batch_tokens, 3 * door.sim.adapter_bytes)
    assert foretold / 2 - 2 * step <= waited <= 2 * foretold + 2 * step


def test_more_ahead_is_a_longer_wait_and_another_flow_counts_only_for_its_share() -> None:
    door = Door(max_sequences=4)

    def expected(adapter: str, tenant: str = "", priority: int = 0) -> float:
        asked = door.sim.make(adapter, tenant=tenant, priority=priority)
        return door.intake.expected(asked)

    empty = expected("hot")
    for _ in range(40):
        door.come("hot", prompt=50)
    assert expected("cold") < 0.3 * expected("hot")
    assert expected("hot", priority=1) == expected("cold", tenant="t", priority=1) == empty
    assert expected("hot", tenant="t") < 0.3 * expected("hot")


def test_a_wait_that_is_too_long_is_refused_with_a_hint() -> None:
    door = Door(max_sequences=2)
    for _ in range(30):
        door.come("hot", prompt=60)
    asked = door.sim.make("hot")
    object.__setattr__(asked.request, "max_wait", 0.2)
    with pytest.raises(Overloaded, match=r"max_wait_seconds: 0.2 s, and the first token") as caught:
        door.intake.enter(asked, len(door.inside))
    assert caught.value.reason == "max_wait"
    assert caught.value.retry_after == pytest.approx(door.intake.expected(asked) - 0.2)
    other = door.sim.make("cold")
    object.__setattr__(other.request, "max_wait", 1.0)
    assert door.intake.enter(other, len(door.inside)) is None
