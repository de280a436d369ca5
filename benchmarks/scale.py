"""Throughput and memory as the number of registered adapters grows, with memory for all and not.

    python benchmarks/scale.py --models models [--counts 1,10,100,1000,5000] [--save]

Every adapter is registered first, without being loaded; then requests, all submitted at once, name
them by the definitions of S-LoRA (`int(np.random.power(alpha, n) * adapters)`: alpha 1 is uniform,
0.1 skewed) and of Punica (a batch of b requests names b adapters, one, ceil(sqrt(b)), or groups of
1.5^k). `cold` runs load what they need; `warm` runs are the same requests again. Then the same
with memory for a hundred adapters only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import busy_seconds, cores, machine, make_adapters, make_models, pin, save

FEW = 100
"""Adapters that fit when not all do."""
EXTRA = 200
"""Adapters that are loaded to see what they take."""


def slora(requests: int, adapters: int, alpha: float, seed: int) -> list[int]:
    """Adapter of each request (S-LoRA, benchmarks/trace.py)."""
    import numpy as np

    np.random.seed(seed)
    return [int(x) for x in (np.random.power(alpha, requests) * adapters).astype(int)]


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


def punica_requests(kind: str, batch: int, requests: int) -> list[int]:
    """Adapter of each request, batch after batch; a batch's are shuffled."""
    rng, found = random.Random(42), list[int]()
    while len(found) < requests:
        group = [i for i, size in enumerate(punica(kind, batch)) for _ in range(size)]
        rng.shuffle(group)
        found += group
    return found[:requests]


class Bench:
    """An engine with every adapter registered."""

    def __init__(self, args: argparse.Namespace, engine: Any, folders: Sequence[Path]) -> None:
        self.args, self.engine = args, engine
        before, began = rss(), time.perf_counter()
        futures = [
            engine.adapters.load(f"a{i}", str(path), register_only=True)
            for i, path in enumerate(folders)
        ]
        for future in futures:
            future.result()
        self.registered = {
            "adapters": len(folders),
            "register_ms_each": round((time.perf_counter() - began) / len(folders) * 1000, 2),
            "rss_bytes_each": round((rss() - before) / len(folders)),
        }
        self._count = 0

    def run(self, chosen: Sequence[int]) -> dict[str, Any]:
        from deltaserve.server.engine.collector import generate
        from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams

        requests = []
        for i, a in enumerate(chosen):
            self._count += 1
            rng = random.Random(i)
            ids = tuple(rng.randrange(300, 4000) for _ in range(self.args.prompt))
            sampling = SamplingParams(max_tokens=self.args.new, ignore_eos=True)
            requests.append(Request(f"r{self._count}", ids, sampling, (AdapterRef(f"a{a}"),)))
        loads, before = self.engine.stats().adapter_loads, busy_seconds()
        began = time.perf_counter()
        answers = generate(self.engine, requests)
        seconds = time.perf_counter() - began
        tokens = sum(len(a.token_ids) for a in answers)
        assert tokens == len(requests) * self.args.new
        return {
            "distinct": len(set(chosen)),
            "tokens_per_second": round(tokens / seconds, 1),
            "loads": self.engine.stats().adapter_loads - loads,
            "other_cpu": round(max(0.0, (busy_seconds() - before) / seconds / cores()), 3),
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


def rss() -> int:
    """Bytes that this process holds, what the allocator could give back not counted."""
    import ctypes
    import gc

    import psutil

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(psutil.Process().memory_info().rss)


@contextmanager
def bench(args: argparse.Namespace, folders: Sequence[Path], nbytes: int) -> Iterator[Bench]:
    import torch

    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.garbage import settled
    from deltaserve.server.model import load

    torch.set_num_threads(args.threads)
    base = load(args.models / args.only, dtype=torch.bfloat16)
    engine = make_engine(
        base,
        EngineConfig(
            prefix_cache=False, kv_cache_bytes=64 << 20, max_sequences=args.batch, max_queue=1 << 20
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


def measure(
    args: argparse.Namespace, folders: Sequence[Path], more: Sequence[Path]
) -> Iterator[dict[str, Any]]:
    counts = [n for n in args.counts if n <= len(folders)]
    file_bytes = sum(f.stat().st_size for f in folders[0].iterdir())
    with bench(args, folders, 2 * file_bytes * len(folders)) as all_fit:
        yield {"what": "registered", **all_fit.registered}
        all_fit.run([0] * args.requests)  # the cache's blocks are there
        yield {"what": "resident", **all_fit.resident(more)}
        for count in counts:
            chosen = slora(args.requests, count, 1.0, 42)
            how = {"memory": "all", "popularity": "slora:1", "registered": count}
            yield {"what": "cold", **how, **all_fit.run(chosen)}
        for _ in range(args.repeat):
            for count in counts:
                chosen = slora(args.requests, count, 1.0, 42)
                how = {"memory": "all", "popularity": "slora:1", "registered": count}
                yield {"what": "warm", **how, **all_fit.run(chosen)}
            for kind in ("distinct", "identical", "uniform", "zipf:1.5"):
                chosen = punica_requests(kind, args.batch, args.requests)
                how = {"memory": "all", "popularity": kind, "registered": len(folders)}
                yield {"what": "warm", **how, **all_fit.run(chosen)}
    with bench(args, folders, FEW * file_bytes) as few_fit:
        for _ in range(args.repeat):
            for alpha in (1.0, 0.1):
                for count in (n for n in counts if n >= FEW):
                    chosen = slora(args.requests, count, alpha, 42)
                    few_fit.run(chosen)
                    how = {"memory": FEW, "popularity": f"slora:{alpha:g}", "registered": count}
                    yield {"what": "warm", **how, **few_fit.run(chosen)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", default="llama-6m")
    parser.add_argument("--counts", default="1,10,100,1000,5000")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--requests", type=int, default=256, help="of one run")
    parser.add_argument("--batch", type=int, default=32, help="requests in one step")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--loaders", type=int, default=2)
    parser.add_argument("--loader-processes", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cores", default="", help="stay on these, e.g. 0,1")
    parser.add_argument("--threads", type=int, default=0, help="that compute; as many as cores")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    args.counts = [int(n) for n in args.counts.split(",")]
    held = pin(args.cores)
    args.threads = args.threads or len(held) or cores()
    make_models(args.models, [args.only])
    keys = ("rank", "requests", "batch", "prompt", "new", "threads", "loaders", "loader_processes")
    how = {"model": args.only, "pinned": held, **{key: getattr(args, key) for key in keys}}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = args.models / f"{args.only}-lora" / "a00"
        made = make_adapters(source, Path(folder), max(args.counts) + EXTRA, args.rank)
        for row in measure(args, made[:-EXTRA], made[-EXTRA:]):
            print(json.dumps(row), flush=True)
            rows.append({**how, **row})
    one = [r["tokens_per_second"] for r in rows if r["what"] == "warm" and r.get("registered") == 1]
    for row in rows:
        if row["what"] == "warm" and one:
            row["to_one_adapter"] = round(row["tokens_per_second"] / (sum(one) / len(one)), 3)
    if args.save:
        save(rows, "scale.jsonl")
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
