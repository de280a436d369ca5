"""What running streams feel while adapters are loaded: their inter-token times, quiet and loaded.

    python benchmarks/churn.py --models models [--only llama-160m] [--rates 1,10] [--save]

Streams of four resident adapters decode, and adapters that are not in memory arrive at each rate:
they are dropped from the page cache, loaded under a new name, and the oldest is unloaded. No
request asks for them, so the steps compute the same as in the quiet phases, and what differs is
what a load costs. Quiet phases and those of each rate alternate within one run. A step gives all
streams a token, so it counts once: the times are those between two tokens of the first stream.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import busy_seconds, cores, machine, make_adapters, make_models, pin, save

PROMPT = 32
RESIDENT = 4
KEPT = 8
"""Adapters that arrived and are still loaded."""


class Streams:
    """The streams' outbox: when each token of the first one came."""

    def __init__(self) -> None:
        self.first = ""
        self.times: list[float] = []
        self.open: set[str] = set()
        self.decoding = threading.Event()
        self.ended = threading.Event()
        self._begun: set[str] = set()

    def deliver(self, outputs: list[Any]) -> None:
        now = time.perf_counter()
        for o in outputs:
            if o.error is not None and o.finish_reason != "cancelled":
                raise o.error
            if o.request_id == self.first and o.token_ids:
                self.times.append(now)
            self._begun.add(o.request_id)
            if o.finish_reason is not None:
                self.open.discard(o.request_id)
        if self._begun >= self.open:
            self.decoding.set()
        if not self.open:
            self.ended.set()


class Arrivals(threading.Thread):
    """Loads adapters at a rate, whether or not those before are done."""

    def __init__(self, engine: Any, folders: Sequence[Path], rate: float) -> None:
        super().__init__(daemon=True)
        self.engine, self.folders, self.rate = engine, folders, rate
        self.stop = threading.Event()
        self.futures: list[Any] = []
        self._kept: deque[str] = deque()

    def run(self) -> None:
        began = time.perf_counter()
        while True:
            due = began + (len(self.futures) + 1) / self.rate
            if self.stop.wait(max(0.0, due - time.perf_counter())):
                return
            i = len(self.futures)
            folder = self.folders[i % len(self.folders)]
            forget(folder)
            name = f"cold{self.rate:g}-{i}-{began:.6f}"
            self.futures.append(self.engine.adapters.load(name, str(folder)))
            self._kept.append(name)
            if len(self._kept) > KEPT and self.futures[i - KEPT].done():
                self.engine.adapters.unload(self._kept.popleft())

    def finish(self) -> list[float]:
        """Seconds that each load took on its thread, of those done by now."""
        done = [f.result() for f in self.futures if f.done()]
        self.stop.set()
        self.join()
        for future in self.futures:
            future.result()
        for name in self._kept:
            self.engine.adapters.unload(name).result()
        return [info.load_seconds for info in done]


def forget(folder: Path) -> None:
    """Drop its files from the page cache, where the system can."""
    for file in folder.iterdir() if hasattr(os, "posix_fadvise") else ():
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def phase(engine: Any, folders: Sequence[Path], rate: float, args: Any) -> dict[str, Any]:
    from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams

    streams = Streams()
    stamp = time.perf_counter()
    requests = [
        Request(
            f"s{i}-{stamp}",
            tuple((i * 131 + k * 17) % 20000 + 10 for k in range(PROMPT)),
            SamplingParams(max_tokens=args.max_tokens, ignore_eos=True),
            (AdapterRef(f"r{i % RESIDENT}"),),
        )
        for i in range(args.streams)
    ]
    streams.first = requests[0].request_id
    streams.open = {r.request_id for r in requests}
    for request in requests:
        engine.submit(request, streams)
    streams.decoding.wait()
    time.sleep(0.2)
    before, began = busy_seconds(), time.perf_counter()
    arrivals = Arrivals(engine, folders, rate) if rate else None
    if arrivals is not None:
        arrivals.start()
    time.sleep(args.seconds)
    end = time.perf_counter()
    if streams.ended.is_set():
        raise SystemExit("the streams ended early: give fewer --seconds or more --max-tokens")
    other = max(0.0, (busy_seconds() - before) / (end - began) / cores())
    loads: list[float] = []
    asked = 0
    if arrivals is not None:
        asked, loads = len(arrivals.futures), arrivals.finish()
    for request in requests:
        engine.cancel(request.request_id)
    streams.ended.wait()
    times = [t for t in streams.times if began <= t <= end]
    if len(times) < 2:
        raise SystemExit(f"fewer than two steps in {args.seconds:g} s: the machine is too busy")
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {"rate": rate, "gaps": gaps, "loads": loads, "asked": asked, "other_cpu": other}


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(phases: Sequence[dict[str, Any]], rates: Sequence[float]) -> list[dict[str, Any]]:
    rows = []
    for rate in (0.0, *rates):
        chosen = [p for p in phases if p["rate"] == rate]
        gaps = [gap for p in chosen for gap in p["gaps"]]
        loads = [seconds for p in chosen for seconds in p["loads"]]
        row = {
            "loads_per_second": rate,
            "steps": len(gaps),
            "p50_ms": round(quantile(gaps, 0.5) * 1000, 2),
            "p99_ms": round(quantile(gaps, 0.99) * 1000, 2),
            "max_ms": round(max(gaps) * 1000, 2),
            "p99_ms_of_each": [round(quantile(p["gaps"], 0.99) * 1000, 2) for p in chosen],
            "loads_asked": sum(p["asked"] for p in chosen),
            "loads_done": len(loads),
            "load_ms": round(sum(loads) / len(loads) * 1000, 1) if loads else None,
            "other_cpu": round(max(p["other_cpu"] for p in chosen), 3),
        }
        quiet = rows[0] if rows else row
        row["p50_ratio"] = round(row["p50_ms"] / quiet["p50_ms"], 3)
        row["p99_ratio"] = round(row["p99_ms"] / quiet["p99_ms"], 3)
        rows.append(row)
    return rows


def alternate(
    engine: Any, folders: Sequence[Path], rates: Sequence[float], args: Any
) -> list[dict[str, Any]]:
    for i, path in enumerate(folders[:RESIDENT]):
        engine.adapters.load(f"r{i}", str(path), pinned=True).result()
    cold = folders[RESIDENT:]
    phase(engine, cold, rates[-1], args)  # warm-up
    kinds = [(0.0, *rates)] * args.repeat
    return [phase(engine, cold, rate, args) for kind in kinds for rate in kind]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from deltaserve.kernels.devices import open_backend
    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.flags import cores as cores_of
    from deltaserve.server.garbage import settled
    from deltaserve.server.model import load

    torch.set_num_threads(args.threads)
    rates = [float(rate) for rate in args.rates.split(",")]
    base = load(
        args.models / args.only,
        dtype=getattr(torch, args.dtype),
        quantize=args.quantize,
        backend=open_backend(args.device),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = args.models / f"{args.only}-lora" / "a00"
        folders = make_adapters(source, Path(folder), args.adapters + RESIDENT)
        engine = make_engine(
            base,
            EngineConfig(prefix_cache=False, kv_cache_bytes=1 << 30),
            AdapterConfig(
                roots=(Path(folder),),
                bytes=1 << 30,
                loaders=args.loaders,
                loader_processes=args.loader_processes,
                loader_nice=args.loader_nice,
                loader_cores=cores_of("--loader-cores", args.loader_cores),
            ),
        )
        engine.start()
        try:
            with settled():
                phases = alternate(engine, folders, rates, args)
        finally:
            engine.shutdown()
    rows = summary(phases, rates)
    keys = (
        "device",
        "threads",
        "loaders",
        "loader_processes",
        "loader_cores",
        "loader_nice",
        "streams",
        "dtype",
    )
    keys += ("quantize", "seconds", "repeat")
    how = {"model": args.only, **{key: getattr(args, key) for key in keys}}
    return [{**how, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", default="llama-160m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--rates", default="1,10", help="arrivals per second")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one phase")
    parser.add_argument("--repeat", type=int, default=5, help="phases of each kind")
    parser.add_argument("--max-tokens", type=int, default=2000)
    parser.add_argument("--adapters", type=int, default=16, help="different ones that arrive")
    parser.add_argument("--cores", default="", help="stay on these, e.g. 0,1")
    parser.add_argument("--threads", type=int, default=0, help="that compute; as many as cores")
    parser.add_argument("--loaders", type=int, default=2)
    parser.add_argument(
        "--loader-processes", action=argparse.BooleanOptionalAction, default=sys.platform == "linux"
    )
    parser.add_argument("--loader-nice", type=int, default=10)
    parser.add_argument("--loader-cores", default="", help="as of deltaserve serve")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    held = pin(args.cores)
    args.threads = args.threads or len(held) or cores()
    make_models(args.models, [args.only])
    rows = [{"pinned": held, **row} for row in measure(args)]
    for row in rows:
        print(json.dumps(row))
    if args.save:
        save(rows, "churn.jsonl")
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
