"""What a flood of one adapter does to the time to the first token of another.

    python benchmarks/fairness.py --models models [--only llama-160m] [--requests 120] [--save]

The victim asks one adapter at random times (Poisson), so often that alone it would use `--load` of
the machine. Alone; on a machine of half the speed; and beside a flood: 32 longer requests of
another adapter always wait, of the same tenant and of another one. The arrivals are the same in
each phase, in the two last ones half as many.

What the fair share is. Two flows that always ask have half of the machine each. With half of it
for itself, the victim would have the times of the phase `half`: nobody else is there, and each step
takes twice as long. A server that does not interrupt its steps can be later by the longest one that
the other flow keeps it busy with: that is the delay guarantee of start-time fair queueing (Goyal,
Vin and Cheng 1996: the expected arrival at the flow's own rate, and the largest packet of each
other flow at the server's). So the victim's 99th percentile is to be at most that of `half` and the
length of the flood's steps, of which the 99th percentile is taken and not the longest, which only a
hiccup of the machine may have made. `of share` is the quotient: at most 1 where a flood cannot take
more than is due to it.

The two last phases show what does not keep to that: the queue served in order of arrival, and
the flows by turns but each turn counted as one, whatever it costs, with a victim whose requests
are cheaper than the flood's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from common import busy_seconds, cores, machine, make_models, pin, save
from watch import Watch, quantile
from worse_queues import QUEUES

FLOOD, VICTIM = "a00", "a01"
QUEUED = 32
PROMPT, ANSWER = 64, 4
FLOOD_PROMPT, FLOOD_ANSWER = 128, 64
PHASES = ("alone", "half", "flood", "flood, other tenant", *QUEUES)


@dataclass
class Served:
    """An engine with both adapters. steps: seconds of each."""

    engine: Any
    steps: list[float] = field(default_factory=list)


@contextmanager
def serving(name: str, args: Any) -> Iterator[Served]:
    """For the phase of that name."""
    import torch

    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine import scheduler
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.engine.collector import generate
    from deltaserve.server.model import load

    base = load(args.models / args.only, dtype=torch.bfloat16, quantize="int8", activations="int8")
    config = EngineConfig(
        kv_cache_bytes=512 << 20,
        max_sequences=args.max_sequences,
        max_batch_tokens=args.max_batch_tokens,
        inter_token_target=args.inter_token_target,
    )
    other = mock.patch.multiple(scheduler, **QUEUES[name]) if name in QUEUES else nullcontext()
    with other:
        engine = make_engine(base, config, AdapterConfig(roots=(args.models,)))
        served, run = Served(engine), engine._runner.run

        def timed(batch: Any) -> Any:
            began = time.perf_counter()
            result = run(batch)
            if name == "half":
                time.sleep(time.perf_counter() - began)
            served.steps.append(time.perf_counter() - began)
            return result

        engine._runner.run = timed  # type: ignore[method-assign]
        engine.start()
        try:
            for adapter in (FLOOD, VICTIM):
                folder = args.models / f"{args.only}-lora" / adapter
                engine.adapters.load(adapter, str(folder)).result(120)
                generate(engine, [ask(random.Random(0), adapter, PROMPT, ANSWER)], 120)
            yield served
        finally:
            engine.shutdown()


_ids = itertools.count()


def ask(rng: random.Random, adapter: str, prompt: int, answer: int, tenant: str = "") -> Any:
    from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams

    return Request(
        f"r{next(_ids)}",
        tuple(rng.randrange(10, 30000) for _ in range(prompt)),
        SamplingParams(max_tokens=answer, ignore_eos=True),
        (AdapterRef(adapter),),
        tenant=tenant,
    )


def request_seconds(engine: Any) -> float:
    """Of one request of the victim with nobody else, the median of some."""
    from deltaserve.server.engine.collector import generate

    rng, times = random.Random(1), []
    for _ in range(9):
        began = time.perf_counter()
        generate(engine, [ask(rng, VICTIM, PROMPT, ANSWER)], 120)
        times.append(time.perf_counter() - began)
    return sorted(times)[4]


def arrivals(rate: float, count: int) -> list[float]:
    rng = random.Random(11)
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


def phase(served: Served, name: str, rate: float, args: Any) -> dict[str, Any]:
    """The victim's times to the first token, in seconds, and the flood's tokens per second."""
    engine, victim, flood = served.engine, Watch(), Watch()
    tenant = "flood" if "tenant" in name else ""
    stop = threading.Event()

    def pour() -> None:
        rng = random.Random(12)
        while not stop.is_set():
            r = ask(rng, FLOOD, FLOOD_PROMPT, FLOOD_ANSWER, tenant)
            flood.open.add(r.request_id)
            engine.submit(r, flood)
            flood.wait(QUEUED + args.max_sequences - 1)

    pouring = threading.Thread(target=pour, daemon=True)
    if name not in ("alone", "half"):
        pouring.start()
        time.sleep(2.0)
    served.steps.clear()
    rng, asked = random.Random(13), {}
    busy, began, tokens = busy_seconds(), time.perf_counter(), flood.tokens
    for at in arrivals(rate, args.requests // 2 if name in QUEUES else args.requests):
        time.sleep(max(0.0, began + at - time.perf_counter()))
        r = ask(rng, VICTIM, PROMPT, ANSWER)
        asked[r.request_id] = time.perf_counter()
        victim.open.add(r.request_id)
        engine.submit(r, victim)
    victim.wait(0)
    seconds = time.perf_counter() - began
    poured, busy = (flood.tokens - tokens) / seconds, busy_seconds() - busy
    steps = sorted(served.steps)
    stop.set()
    for request_id in list(flood.open):
        engine.cancel(request_id)
    if pouring.ident is not None:
        pouring.join()
    for request_id in list(flood.open):
        engine.cancel(request_id)
    flood.wait(0)
    times = sorted(victim.first[i] - began for i, began in asked.items())
    return {
        "phase": name,
        "requests": len(times),
        "p50": round(quantile(times, 0.5), 4),
        "p99": round(quantile(times, 0.99), 4),
        "step_p99": round(quantile(steps, 0.99), 4),
        "flood_tokens_per_second": round(poured, 1),
        "preemptions": engine.stats().preemptions,
        "other_cpu": round(max(0.0, busy / seconds / cores()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", default="llama-160m")
    parser.add_argument("--requests", type=int, default=120, help="of the victim in each phase")
    parser.add_argument("--load", type=float, default=0.3, help="the victim's, of the machine")
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--max-batch-tokens", type=int, default=256)
    parser.add_argument("--inter-token-target", type=float, help="as of deltaserve serve")
    parser.add_argument("--cores", default="", help="such as 0,1; all of them if left out")
    parser.add_argument("--save", action="store_true", help="append to results/fairness.jsonl")
    args = parser.parse_args()
    pinned = pin(args.cores)
    make_models(args.models, [args.only])
    print(json.dumps(machine()), f"cores {pinned or cores()}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    rate = half = 0.0
    header = ("requests", "p50 s", "p99 s", "share s", "of share", "flood tok/s", "other cpu")
    print(f"{'phase':<26}" + "".join(f"{h:>12}" for h in header))
    for name in PHASES:
        with serving(name, args) as served:
            rate = rate or args.load / request_seconds(served.engine)
            row = phase(served, name, rate, args)
        half = row["p99"] if name == "half" else half
        shown = [row["requests"], f"{row['p50']:.3f}", f"{row['p99']:.3f}", "", "", ""]
        if name not in ("alone", "half"):
            row["share_p99"] = round(half + row["step_p99"], 4)
            row["of_share"] = round(row["p99"] / row["share_p99"], 3)
            shown[3:] = [f"{row['share_p99']:.3f}", row["of_share"], row["flood_tokens_per_second"]]
        rows.append({"benchmark": "fairness", "model": args.only, "rate": round(rate, 3), **row})
        shown.append(row["other_cpu"])
        print(f"{name:<26}" + "".join(f"{x:>12}" for x in shown), flush=True)
    if args.save:
        save(rows, "fairness.jsonl")


if __name__ == "__main__":
    main()
