"""What a flood does to the times of light traffic, against the reference of
benchmarks/fairness.py: half the machine and one step. Schedulers that are not fair miss it."""

import random
import sys
from pathlib import Path
from unittest import mock

import pytest
from simulation import Simulation

from deltaserve.server.engine import scheduler
from deltaserve.server.engine.sequence import Sequence

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from watch import quantile
from worse_queues import QUEUES

SHARES = (0.5, 0.9, 0.99, 1.0)
SEEDS = (3, 4, 5)


def light(sim: Simulation, seed: int) -> list[Sequence]:
    """Poisson arrivals of short requests, for about a third of the machine."""
    rng, at, made = random.Random(seed), 1.0, []
    for _ in range(120):
        at += rng.expovariate(1 / 0.25)
        made.append(sim.submit("victim", at=at, prompt=48, answer=4))
    return made


def waits(sim: Simulation, asked: list[Sequence]) -> list[float]:
    """At the percentiles of `SHARES`."""
    times = sorted(sim.first[s] - s.submitted for s in asked)
    return [quantile(times, q) for q in SHARES]


def half(seed: int) -> list[float]:
    sim = Simulation(slower=2.0)
    asked = light(sim, seed)
    sim.run()
    return waits(sim, asked)


def beside_flood(seed: int, adapter: str = "hot", tenant: str = "") -> tuple[list[float], float]:
    """And the longest step."""
    sim = Simulation()
    asked = light(sim, seed)
    while any(s not in sim.first for s in asked):
        while len(sim.scheduler.waiting) < 32:
            sim.submit(adapter, tenant=tenant, prompt=96, answer=64)
        sim.step()
    return waits(sim, asked), sim.longest


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("adapter", "tenant"), [("hot", ""), ("hot", "t"), ("victim", "t")])
def test_a_flood_takes_no_more_than_its_share(adapter: str, tenant: str, seed: int) -> None:
    """At each percentile, and even the request that has to wait longest."""
    beside, step = beside_flood(seed, adapter, tenant)
    for time, share in zip(beside, half(seed), strict=True):
        assert time <= share + step


@pytest.mark.parametrize("queue", QUEUES)
def test_who_is_not_fair_misses_it(queue: str) -> None:
    for seed in SEEDS:
        with mock.patch.multiple(scheduler, **QUEUES[queue]):
            beside, step = beside_flood(seed)
        assert beside[2] > 1.5 * (half(seed)[2] + step)
