"""Throughput and memory as the number of registered adapters grows, with memory for all and not.

    python benchmarks/scale.py --models models [--counts 1,10,100,1000,5000] [--save]

The base has 160 M parameters, in the form that is fastest (int8 weights and activations); adapters
have rank 8 on q_proj and v_proj (scale_adapters.py). They are registered without being loaded, up
to each count, and at each the same requests are served:

- `one`: all name the first adapter, so that it differs from count to count only by what is
  *registered*;
- `slora:1`: S-LoRA's synthetic workload, all at once: requests name adapters by
  `int(np.random.power(alpha, n) * adapters)`, which is uniform; `cold` with the loads that takes,
  then `warm`, with all in memory. **This is the line that the goal is about**: 90 % of `one` by
  turns with it at the same count (`to_one_here`, of medians), up to 5000, as long as those in use
  fit in memory. The quotient to `one` with one adapter registered (`to_one_adapter`) has in it what
  the machine drifts by between the two;
- `open`: S-LoRA's arrivals, gamma with --cv (1: Poisson), at --open-load of the requests per second
  that `one` reached with one adapter registered. Throughput cannot exceed the rate there; what it
  shows is the time to the first token.

Lengths are S-LoRA's, uniform from 8 to a longest, but 64 instead of 512. Then Punica's batches with
all registered, closed loop: identical adapters, distinct ones, ceil(sqrt(b)), groups of 1.5^k. Then
memory for a hundred adapters only, uniform and with alpha 0.1, where each run goes on loading. The
row `step` says what a step reads and multiplies for the base and for distinct adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from common import busy_seconds, cores, machine, make_models, pin, rss, save
from popularity import PUNICA, Asked, punica_trace, slora_trace
from scale_adapters import shapes, write_adapters
from watch import Watch, quantile

FEW = 100
"""Adapters that fit when not all do."""
EXTRA = 200
"""Adapters that are loaded to see what they take."""
LONGEST = 64
"""Most tokens of a prompt and of an answer."""


class Bench:
    """An engine, and the adapters registered with it so far."""

    def __init__(self, args: argparse.Namespace, engine: Any, folders: Sequence[Path]) -> None:
        self.args, self.engine, self.folders = args, engine, folders
        self.known = self._count = 0

    def register(self, count: int) -> dict[str, Any]:
        """Up to so many, and what one of those takes."""
        more, before, began = self.folders[self.known : count], rss(), time.perf_counter()
        load = self.engine.adapters.load
        futures = [load(folder.name, str(folder), register_only=True) for folder in more]
        for future in futures:
            future.result()
        self.known = count
        return {
            "adapters": count,
            "register_ms_each": round((time.perf_counter() - began) / len(more) * 1000, 2),
            "rss_bytes_each": round((rss() - before) / len(more)),
        }

    def run(self, asked: Sequence[Asked]) -> dict[str, Any]:
        from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams

        watch, came, requests = Watch(), dict[str, float](), []
        for i, one in enumerate(asked):
            self._count += 1
            rng = random.Random(i)
            ids = tuple(rng.randrange(300, 4000) for _ in range(one.prompt))
            sampling = SamplingParams(max_tokens=one.answer, ignore_eos=True)
            adapter = AdapterRef(self.folders[one.adapter].name)
            requests.append(Request(f"r{self._count}", ids, sampling, (adapter,)))
        watch.open = {r.request_id for r in requests}
        loads, busy = self.engine.stats().adapter_loads, busy_seconds()
        began = time.perf_counter()
        for one, request in zip(asked, requests, strict=True):
            time.sleep(max(0.0, began + one.at - time.perf_counter()))
            came[request.request_id] = time.perf_counter()
            self.engine.submit(request, watch)
        watch.wait(0)
        seconds = time.perf_counter() - began
        assert watch.tokens == sum(one.answer for one in asked)
        stats = self.engine.stats()
        times = sorted(watch.first[i] - at for i, at in came.items())
        return {
            "requests": len(asked),
            "distinct": len({one.adapter for one in asked}),
            "requests_per_second": round(len(asked) / seconds, 2),
            "tokens_per_second": round(watch.tokens / seconds, 1),
            "ttft_p50": round(quantile(times, 0.5), 3),
            "ttft_p99": round(quantile(times, 0.99), 3),
            "loads_per_second": round((stats.adapter_loads - loads) / seconds, 1),
            "resident": sum(i.resident_bytes > 0 for i in self.engine.adapters.list()),
            "other_cpu": round(max(0.0, (busy_seconds() - busy) / seconds / cores()), 3),
        }

    def resident(self, folders: Sequence[Path]) -> dict[str, Any]:
        """What some more take in memory: counted, and as the process grows."""
        adapters, before = self.engine.adapters, rss()
        held = [adapters.load(f"x{i}", str(f)).result() for i, f in enumerate(folders)]
        grown = rss() - before
        for info in held:
            adapters.unload(info.name).result()
        files = sum(info.source_bytes for info in held)
        return {
            "adapters": len(held),
            "file_bytes_each": round(files / len(held)),
            "resident_to_file_bytes": round(sum(i.resident_bytes for i in held) / files, 4),
            "rss_bytes_each": round(grown / len(held)),
        }


@contextmanager
def bench(args: argparse.Namespace, folders: Sequence[Path], nbytes: int) -> Iterator[Bench]:
    import torch

    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.garbage import settled
    from deltaserve.server.model import load

    torch.set_num_threads(args.threads)
    base = load(
        args.models / args.only,
        dtype=torch.bfloat16,
        quantize=args.quantize,
        activations=args.activations,
    )
    engine = make_engine(
        base,
        EngineConfig(
            prefix_cache=False,
            kv_cache_bytes=256 << 20,
            max_sequences=args.batch,
            max_queue=1 << 20,
        ),
        AdapterConfig(
            roots=(folders[0].parent,),
            bytes=nbytes,
            loaders=args.loaders,
            loader_processes=args.loader_processes,
        ),
    )
    engine.start()
    try:
        with settled():
            yield Bench(args, engine, folders)
    finally:
        engine.shutdown()


def step_row(args: argparse.Namespace, base_bytes: int) -> dict[str, Any]:
    """What a step of `batch` tokens reads and multiplies at most: each of the base's weights and
    each of its adapters' once, the adapters' tokens only with their own."""
    config = json.loads((args.models / args.only / "config.json").read_text())
    hidden, inner, layers = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    wide = config["num_attention_heads"] * config["head_dim"]
    narrow = config["num_key_value_heads"] * config["head_dim"]
    layer = hidden * (2 * wide + 2 * narrow + 3 * inner)
    adapter = sum(rows * columns for rows, columns in shapes(args.models / args.only).values())
    return {
        "base_bytes": base_bytes,
        "adapter_bytes": 2 * adapter * args.batch,
        "base_products_per_token": layers * layer + hidden * config["vocab_size"],
        "adapter_products_per_token": adapter,
    }


def measure(
    args: argparse.Namespace, folders: Sequence[Path], more: Sequence[Path]
) -> Iterator[dict[str, Any]]:
    file_bytes = (folders[0] / "adapter_model.safetensors").stat().st_size
    one = slora_trace(args.requests, 1, 1.0, LONGEST)
    rate = 0.0
    with bench(args, folders, 2 * file_bytes * (len(folders) + EXTRA)) as all_fit:
        yield {"what": "step", **step_row(args, all_fit.engine.info().memory.weights)}
        for count in args.counts:
            registered = all_fit.register(count)
            how = {"memory": "all", "registered": count}
            all_fit.run(one[: args.batch])
            uniform = slora_trace(args.requests, count, 1.0, LONGEST)
            if count > 1:
                yield {"what": "cold", "popularity": "slora:1", **how, **all_fit.run(uniform)}
            for _ in range(args.repeat):
                row = all_fit.run(one)
                if count == args.counts[0]:
                    rate = max(rate, args.open_load * row["requests_per_second"])
                yield {"what": "warm", "popularity": "one", **how, **row}
                if count > 1:
                    yield {"what": "warm", "popularity": "slora:1", **how, **all_fit.run(uniform)}
            arriving = slora_trace(args.requests, count, 1.0, LONGEST, rate, args.cv)
            yield {"what": "open", "popularity": "slora:1", **how, **all_fit.run(arriving)}
        yield {"what": "registered", **registered}
        for kind in PUNICA:
            asked = punica_trace(kind, args.batch, args.requests, count, 32, 32)
            all_fit.run(asked[: args.batch])
            yield {"what": "warm", "popularity": kind, **how, **all_fit.run(asked)}
        yield {"what": "resident", **all_fit.resident(more)}
    with bench(args, folders, FEW * file_bytes) as few_fit:
        for count in (n for n in args.counts if n > FEW):
            few_fit.register(count)
            for alpha in (1.0, 0.1):
                asked = slora_trace(args.requests, count, alpha, LONGEST)
                few_fit.run(asked)
                how = {"memory": FEW, "popularity": f"slora:{alpha:g}", "registered": count}
                yield {"what": "warm", **how, **few_fit.run(asked)}


def with_shares(rows: Sequence[dict[str, Any]]) -> None:
    """Add each warm row's throughput as a share of the median of `one` with one registered, and
    with as many."""

    def usual(count: int) -> float:
        found = [
            r["tokens_per_second"]
            for r in rows
            if r["what"] == "warm" and r["popularity"] == "one" and r["registered"] == count
        ]
        return median(found) if found else 0.0

    for row in rows:
        if row["what"] == "warm" and row["popularity"] not in PUNICA:
            for key, count in (("to_one_adapter", 1), ("to_one_here", row["registered"])):
                if usual(count):
                    row[key] = round(row["tokens_per_second"] / usual(count), 3)
    identical = [r["tokens_per_second"] for r in rows if r.get("popularity") == "identical"]
    for row in rows:
        if row.get("popularity") in PUNICA and identical:
            row["to_identical"] = round(row["tokens_per_second"] / identical[0], 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", default="llama-160m")
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--activations", default="int8")
    parser.add_argument("--counts", default="1,10,100,1000,5000", help="ascending")
    parser.add_argument("--requests", type=int, default=128, help="of one run")
    parser.add_argument("--batch", type=int, default=32, help="requests in one step")
    parser.add_argument("--cv", type=float, default=1.0, help="of the gaps between arrivals")
    parser.add_argument("--open-load", type=float, default=0.6, help="of the open loop")
    parser.add_argument("--repeat", type=int, default=5, help="of `one` and `slora:1`, by turns")
    parser.add_argument("--loaders", type=int, default=2)
    parser.add_argument("--loader-processes", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cores", default="", help="stay on these, e.g. 0,1")
    parser.add_argument("--threads", type=int, default=0, help="that compute; as many as cores")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    args.counts = sorted(int(n) for n in args.counts.split(","))
    held = pin(args.cores)
    args.threads = args.threads or len(held) or cores()
    make_models(args.models, [args.only])
    keys = ("quantize", "activations", "requests", "batch", "cv", "open_load", "threads", "loaders")
    how = {"model": args.only, "pinned": held, **{key: getattr(args, key) for key in keys}}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = write_adapters(args.models / args.only, Path(folder), max(args.counts) + EXTRA)
        for row in measure(args, made[:-EXTRA], made[-EXTRA:]):
            print(json.dumps(row), flush=True)
            rows.append(row)
    with_shares(rows)
    shown = ("memory", "registered", "popularity", "to_one_adapter", "to_one_here", "to_identical")
    for row in rows:
        if row["what"] == "warm":
            print(json.dumps({key: row[key] for key in shown if key in row}))
    if args.save:
        save([{**how, **row} for row in rows], "scale.jsonl")
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
