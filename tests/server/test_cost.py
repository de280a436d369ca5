"""What a step costs is learnt from the steps, whatever disturbs some of them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.server.engine.cost import CostModel, StepLoad
from deltaserve.server.engine.residency import Residency

MB = 1 << 20


@pytest.mark.parametrize(
    ("fixed", "per_byte", "per_token"),
    [(0.05, 1e-10, 2e-3), (0.5, 2e-9, 1e-4), (1e-3, 1e-11, 1e-4), (5e-3, 1e-12, 1e-5)],
)
def test_it_learns_a_machine_from_its_steps(
    fixed: float, per_byte: float, per_token: float
) -> None:
    """Times that vary by 30 %, and one step in twenty held up fifty times as long."""
    rng, cost = random.Random(5), CostModel(300 * MB)

    def true(tokens: int, size: int) -> float:
        return fixed + per_byte * size + per_token * tokens

    for _ in range(400):
        tokens, size = rng.choice([rng.randint(1, 16), rng.randint(16, 512)]), rng.randint(0, 900)
        seconds = true(tokens, size * MB) * rng.lognormvariate(0, 0.3)
        if rng.random() < 0.05:
            seconds *= 50
        cost.observe(tokens, size * MB, seconds)
    for tokens, size in ((1, 0), (16, 100 * MB), (256, 0), (512, 800 * MB)):
        assert cost.seconds(tokens, size) == pytest.approx(true(tokens, size), rel=0.3)


@pytest.mark.parametrize("spread", [0.0, 0.02])
@pytest.mark.parametrize("slower", [0.1, 10.0])
def test_steps_with_the_same_adapters(slower: float, spread: float) -> None:
    """What they cost is told from the base's cost by their bytes: all that is left to tell it by,
    or nearly all."""
    rng, cost, per_byte = random.Random(3), CostModel(300 * MB), slower / 20e9
    for _ in range(800):
        tokens, size = rng.randint(1, 64), 60 * MB * (1 + spread * rng.random())
        seconds = per_byte * (300 * MB + size + 8 * MB * tokens) * rng.lognormvariate(0, 0.3)
        cost.observe(tokens, int(size), seconds)
    assert cost.per_byte == pytest.approx(per_byte, rel=0.3)
    assert cost.fixed == pytest.approx(per_byte * 300 * MB, rel=0.3)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = CostModel(300 * MB)
    for factor in (1.0, 4.0):
        for i in range(600):
            tokens = 1 + i % 64
            cost.observe(tokens, 0, factor * (0.01 + 0.001 * tokens))
        assert cost.seconds(32, 0) == pytest.approx(factor * 0.042, rel=0.05)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 600), st.integers(0, 1 << 30), st.floats(1e-6, 100)), max_size=30
    )
)
def test_nothing_ever_costs_nothing(steps: list[tuple[int, int, float]]) -> None:
    cost = CostModel(300 * MB)
    for step in steps:
        cost.observe(*step)
    assert cost.fixed > 0 and cost.per_byte > 0 and cost.per_token > 0


def test_tokens_within_a_time() -> None:
    cost = CostModel(300 * MB)
    for size in (0, 50 * MB):
        tokens = cost.tokens_within(0.1, size)
        assert cost.seconds(tokens, size) <= 0.1 < cost.seconds(tokens + 1, size)
    assert cost.tokens_within(0.0, 0) < 0


class One:
    def __init__(self, *adapters: Residency) -> None:
        self.adapters = adapters


def test_a_step_is_divided_among_its_sequences() -> None:
    """The base equally, an adapter among those it is read for, tokens each its own."""
    cost = CostModel(300 * MB)
    a, b = Residency("a", "", nbytes=80 * MB), Residency("b", "", nbytes=8 * MB)
    base, first, second, both = One(), One(a), One(a), One(a, b)
    load = StepLoad()
    tokens = {base: 1, first: 1, second: 30, both: 2}
    for one, count in tokens.items():
        load.add(one, count)  # type: ignore[arg-type]
    assert (load.tokens, load.adapter_bytes) == (34, 88 * MB)
    charges = cost.charges(load, tokens)  # type: ignore[arg-type]
    assert sum(charges.values()) == pytest.approx(cost.seconds(34, 88 * MB))
    share, third = cost.fixed / 4, cost.per_byte * 80 * MB / 3
    assert charges[base] == pytest.approx(share + cost.per_token)  # type: ignore[index]
    assert charges[second] == pytest.approx(share + 30 * cost.per_token + third)  # type: ignore[index]
    assert charges[both] == pytest.approx(  # type: ignore[index]
        share + 2 * cost.per_token + third + cost.per_byte * 8 * MB
    )
