"""One worker process of a peer: its arguments, the workloads in order, a JSON line for each."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import busy_seconds, cores
from workloads import NEW, PROMPT, Answers, adapter_folder, workload

__all__ = ["NEW", "PROMPT", "Answers", "adapter_folder", "arguments", "by_adapter", "measure"]

Requests = list[tuple[list[int], int | None]]


def arguments() -> argparse.Namespace:
    """models: folder with MODEL and MODEL-lora; form: the peer's name of a weight format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--form", required=True)
    parser.add_argument("--workloads", required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def by_adapter(requests: Requests) -> list[list[int]]:
    """Indices of the requests that share an adapter: these peers batch no others together."""
    groups: dict[int | None, list[int]] = {}
    for i, (_, adapter) in enumerate(requests):
        groups.setdefault(adapter, []).append(i)
    return list(groups.values())


def measure(names: list[str], serve: Callable[[Requests, int], Answers], version: str) -> None:
    """serve: requests, new tokens of each -> the new tokens. After a warm-up of the same shapes."""
    for name in names:
        requests = workload(name)
        serve(requests, 2)
        before, began = busy_seconds(), time.perf_counter()
        answers = serve(requests, NEW)
        wall = time.perf_counter() - began
        assert all(len(a) == NEW for a in answers), [len(a) for a in answers]
        row = {
            "workload": name,
            "seconds": round(wall, 4),
            "tokens_per_second": round(len(answers) * NEW / wall, 1),
            "other_cpu": round(max(0.0, (busy_seconds() - before) / wall / cores()), 3),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "version": version,
            "answers": answers,
        }
        print(json.dumps(row), flush=True)
