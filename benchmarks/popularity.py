"""Which adapter each request names, how long it is and when it comes, as S-LoRA and Punica define
it."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

PUNICA = ("identical", "uniform", "zipf:1.5", "distinct")


class Asked(NamedTuple):
    """prompt, answer: tokens. at: seconds after the first one could have come."""

    adapter: int
    prompt: int
    answer: int
    at: float = 0.0


def slora(requests: int, adapters: int, alpha: float, seed: int) -> list[int]:
    """Adapter of each request (S-LoRA, benchmarks/trace.py): alpha 1 is uniform, 0.1 skewed."""
    import numpy as np

    np.random.seed(seed)
    return [int(x) for x in (np.random.power(alpha, requests) * adapters).astype(int)]


def slora_gaps(requests: int, rate: float, cv: float, seed: int) -> list[float]:
    """Seconds before each request (S-LoRA, benchmarks/trace.py): gamma with mean 1/rate and
    coefficient of variation cv; with cv 1 the arrivals are a Poisson process."""
    import numpy as np

    shape = 1 / cv**2
    return [float(x) for x in np.random.default_rng(seed).gamma(shape, cv**2 / rate, requests)]


def slora_trace(
    requests: int, adapters: int, alpha: float, longest: int, rate: float = 0.0, cv: float = 1.0
) -> list[Asked]:
    """S-LoRA's synthetic workload. Lengths are uniform from 8 to `longest`, the same whatever the
    adapters are. rate: requests per second; 0 has all come at once."""
    chosen = slora(requests, adapters, alpha, 42)
    lengths, now, found = random.Random(42), 0.0, list[Asked]()
    gaps = slora_gaps(requests, rate, cv, 42) if rate else [0.0] * requests
    for adapter, gap in zip(chosen, gaps, strict=True):
        now += gap
        prompt, answer = lengths.randint(8, longest), lengths.randint(8, longest)
        found.append(Asked(adapter, prompt, answer, now))
    return found


def punica(kind: str, batch: int) -> list[int]:
    """Requests of each adapter of a batch (Punica, benchmarks/benchmark_utils.py)."""
    match kind:
        case "distinct":
            return [1] * batch
        case "identical":
            return [batch]
        case "uniform":
            count = math.ceil(math.sqrt(batch))
            return [batch // count + (i < batch % count) for i in range(count)]
        case _:
            base, sizes = float(kind.removeprefix("zipf:")), list[int]()
            while sum(sizes) < batch:
                sizes.append(min(math.floor(base ** len(sizes)), batch - sum(sizes)))
            return sizes


def punica_trace(
    kind: str, batch: int, requests: int, adapters: int, prompt: int, answer: int
) -> list[Asked]:
    """Batch after batch, a batch's requests shuffled; all lengths equal, so that they remain
    batches. The adapters are spread over all that are registered."""
    rng, found = random.Random(42), list[Asked]()
    while len(found) < requests:
        sizes = punica(kind, batch)
        apart = max(1, adapters // len(sizes))
        group = [i * apart % adapters for i, size in enumerate(sizes) for _ in range(size)]
        rng.shuffle(group)
        found += [Asked(adapter, prompt, answer) for adapter in group]
    return found[:requests]
