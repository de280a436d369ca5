"""What a flood of one adapter does to the time to the first token of another.

    python benchmarks/fairness.py --models models [--only llama-160m] [--seconds 20] [--save]

The victim asks one adapter at random times (Poisson), lightly. Alone; with half the machine, which
is its fair share: the same times, each step taking twice as long; and beside a flood: 64 requests
of another adapter always wait, by turns of the same tenant and of another one. In the last phase
the queue is served in order of arrival, as without fairness. One process, the same arrivals in each
phase; the table shows the victim's 50th and 99th percentile in each, and the flood's tokens.
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

from common import cores, machine, make_models, pin, save

FLOOD, VICTIM = "a00", "a01"
QUEUED = 64
PROMPT, ANSWER = 64, 16
FLOOD_PROMPT, FLOOD_ANSWER = 128, 64
PHASES = ("alone", "half", "flood", "flood, other tenant", "first come, first served")


@dataclass(eq=False)
class Watch:
    """An outbox: when each request's first token came, and how many are open."""

    first: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    open: set[str] = field(default_factory=set)
    news: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, outputs: list[Any]) -> None:
        now = time.perf_counter()
        with self.news:
            for o in outputs:
                if o.error is not None and o.finish_reason != "cancelled":
                    raise o.error
                self.tokens += len(o.token_ids)
                if o.token_ids:
                    self.first.setdefault(o.request_id, now)
                if o.finish_reason is not None:
                    self.open.discard(o.request_id)
            self.news.notify_all()

    def wait(self, most: int) -> None:
        """Until no more than so many are open."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.open) <= most, 300), "300 s without an end"


@contextmanager
def serving(models: Path, model: str, slow: bool, fair: bool, args: Any) -> Iterator[Any]:
    """An engine with both adapters. slow: each step takes twice as long."""
    import torch

    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine import scheduler
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.engine.collector import generate
    from deltaserve.server.model import load

    base = load(models / model, dtype=torch.bfloat16, quantize="int8")
    config = EngineConfig(
        prefix_cache=False,
        kv_cache_bytes=512 << 20,
        max_sequences=args.max_sequences,
        max_batch_tokens=args.max_batch_tokens,
        inter_token_target=args.inter_token_target,
    )
    fifo = {"FairQueue": one_flow(), "claim": lambda *how: None, "prompt_shares": in_order}
    with nullcontext() if fair else mock.patch.multiple(scheduler, **fifo):
        engine = make_engine(base, config, AdapterConfig(roots=(models,)))
        if slow:
            run = engine._runner.run

            def twice(batch: Any) -> Any:
                began = time.perf_counter()
                result = run(batch)
                time.sleep(time.perf_counter() - began)
                return result

            engine._runner.run = twice  # type: ignore[method-assign]
        engine.start()
        try:
            for name in (FLOOD, VICTIM):
                folder = models / f"{model}-lora" / name
                engine.adapters.load(name, str(folder)).result(120)
                generate(engine, [ask(random.Random(0), name, PROMPT, 4)], 120)
            yield engine
        finally:
            engine.shutdown()


def one_flow() -> Any:
    """A queue that takes everybody for the same."""
    from deltaserve.server.engine.fair_queue import FairQueue, Flow, Tenant

    class Fifo(FairQueue):
        def _flow(self, sequence: Any) -> Flow:
            tenant = self._tenants.setdefault("", Tenant(""))
            self._flows = 1
            return tenant.flows.setdefault("", Flow(tenant, ""))

    return Fifo


def in_order(prompts: list[Any], head: Any, budget: int) -> list[tuple[Any, int]]:
    return [(s, budget) for s in prompts]


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


def arrivals(rate: float, seconds: float) -> list[float]:
    rng, at, found = random.Random(11), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append(at)
    return found


def phase(engine: Any, name: str, args: Any) -> dict[str, Any]:
    """The victim's times to the first token, in seconds, and the flood's tokens per second."""
    victim, flood, rng = Watch(), Watch(), random.Random(13)
    tenant = "flood" if "tenant" in name else ""
    stop = threading.Event()

    def pour() -> None:
        while not stop.is_set():
            r = ask(rng, FLOOD, FLOOD_PROMPT, FLOOD_ANSWER, tenant)
            flood.open.add(r.request_id)
            engine.submit(r, flood)
            flood.wait(QUEUED + args.max_sequences - 1)

    pouring = threading.Thread(target=pour, daemon=True)
    if name not in ("alone", "half"):
        pouring.start()
        time.sleep(2.0)
    began, tokens, asked = time.perf_counter(), flood.tokens, {}
    for at in arrivals(args.rate, args.seconds):
        time.sleep(max(0.0, began + at - time.perf_counter()))
        r = ask(rng, VICTIM, PROMPT, ANSWER)
        asked[r.request_id] = time.perf_counter()
        victim.open.add(r.request_id)
        engine.submit(r, victim)
    victim.wait(0)
    poured = (flood.tokens - tokens) / (time.perf_counter() - began)
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
        "flood_tokens_per_second": round(poured, 1),
        "preemptions": engine.stats().preemptions,
    }


def quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", default="llama-160m")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--rate", type=float, default=1.0, help="the victim's requests per second")
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--max-batch-tokens", type=int, default=256)
    parser.add_argument("--inter-token-target", type=float, help="as of deltaserve serve")
    parser.add_argument("--cores", default="", help="such as 0,1; all of them if left out")
    parser.add_argument("--save", action="store_true", help="append to results/fairness.jsonl")
    args = parser.parse_args()
    pinned = pin(args.cores)
    make_models(args.models, [args.only])
    print(json.dumps(machine()), f"cores {pinned or cores()}", file=sys.stderr)
    rows = []
    print(f"{'phase':<26}{'requests':>9}{'p50 s':>9}{'p99 s':>9}{'flood tok/s':>13}")
    for name in PHASES:
        with serving(args.models, args.only, name == "half", "first" not in name, args) as engine:
            row = phase(engine, name, args)
        rows.append({"benchmark": "fairness", "model": args.only, "rate": args.rate, **row})
        print(
            f"{name:<26}{row['requests']:>9}{row['p50']:>9.3f}{row['p99']:>9.3f}"
            f"{row['flood_tokens_per_second']:>13.1f}",
            flush=True,
        )
    if args.save:
        save(rows, "fairness.jsonl")


if __name__ == "__main__":
    main()
