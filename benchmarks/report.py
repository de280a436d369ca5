"""Markdown tables of the last runs in results/, for docs/performance.md and the README.

python benchmarks/report.py [mixed | fairness | scale]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, median_low
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORKLOADS = {
    "W1": "16 requests, 16 adapters",
    "W4": "16 requests, 4 adapters",
    "W2": "16 requests, base",
    "W3": "1 request, base",
    "W5": "16 requests, 16 kinds",
}
FAIRNESS = {
    "phase": "victim",
    "requests": "requests",
    "p50": "p50 s",
    "p99": "p99 s",
    "share_p99": "fair share, p99 s",
    "of_share": "of it",
    "flood_tokens_per_second": "flood tokens/s",
}
SCALE = {
    "what": "run",
    "memory": "memory for",
    "registered": "registered",
    "popularity": "popularity",
    "distinct": "distinct",
    "tokens_per_second": "tokens/s",
    "to_one_adapter": "of one adapter's",
    "to_one_here": "of one's here",
    "to_identical": "of identical",
    "ttft_p50": "TTFT p50 s",
    "ttft_p99": "TTFT p99 s",
    "loads_per_second": "loads/s",
    "resident": "resident",
}
ALIKE = ("what", "phase", "memory", "registered", "popularity")
"""Rows of one run that agree in these are repeats."""


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]


def last_run(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    rows = [r for r in rows if r["model"] == model]
    return [r for r in rows if (r["date"], r["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]


def medians(rows: list[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """One row for those that agree in `by`: of numbers the median."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in by), []).append(row)
    return [
        first
        | {
            key: (median_low if isinstance(value, int) else middle)(
                [r[key] for r in (first, *more)]
            )
            for key, value in first.items()
            if isinstance(value, int | float)
        }
        for first, *more in groups.values()
    ]


def middle(values: Sequence[float]) -> float:
    return round(median(values), 3)


def columns(rows: list[dict[str, Any]], names: dict[str, str]) -> str:
    lines = ["| " + " | ".join(names.values()) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(str(row.get(key, "-")) for key in names) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["engine"], row["form"], row["workload"])
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    lines = ["| engine | form | " + " | ".join(WORKLOADS.values()) + " |"]
    lines.append("|---" * (2 + len(WORKLOADS)) + "|")
    for engine, form in dict.fromkeys((e, f) for e, f, _ in best):
        cells = []
        for w in WORKLOADS:
            row, peer = best.get((engine, form, w)), best.get(("transformers", "bfloat16", w))
            if row is None:
                cells.append("-")
                continue
            ratio = f" ({peer['seconds'] / row['seconds']:.1f}x)" if peer else ""
            cells.append(f"{row['tokens_per_second']:.0f}{ratio}")
        lines.append(f"| {engine} | {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def where(first: dict[str, Any]) -> str:
    return (
        f"{first['cpu']}, {first['cores']} cores; torch {first['torch']}, transformers "
        f"{first['transformers']}, PEFT {first['peft']}, Python {first['python']}; commit "
        f"{first['commit']}, {first['date']}"
    )


def mixed() -> None:
    every = read("mixed.jsonl")
    for model in dict.fromkeys(row["model"] for row in every):
        rows = last_run(every, model)
        repeats = max(
            sum((r["engine"], r["form"], r["workload"]) == key for r in rows)
            for key in {(r["engine"], r["form"], r["workload"]) for r in rows}
        )
        print(f"### {model}\n\n{where(rows[0])}; fastest of {repeats}.\n")
        print(table(rows) + "\n")


def server(file: str, names: dict[str, str]) -> None:
    """The last run of fairness.py or scale.py: what was served, then what an adapter takes."""
    every = read(file)
    rows = last_run(every, every[-1]["model"])
    print(f"{where(rows[0])}.\n")
    served = [row for row in rows if "p99" in row or "ttft_p99" in row]
    print(columns(medians(served, ALIKE), names) + "\n")
    how = set.intersection(*map(set, rows))
    for row in (r for r in rows if r.get("what") in ("step", "registered", "resident")):
        print(f"- {row['what']}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in how))


def main() -> None:
    match sys.argv[1:] or ["mixed"]:
        case ["fairness"]:
            server("fairness.jsonl", FAIRNESS)
        case ["scale"]:
            server("scale.jsonl", SCALE)
        case ["mixed"]:
            mixed()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
