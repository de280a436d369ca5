"""Markdown tables of the last run in results/mixed.jsonl, for docs/performance.md and the README.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "mixed.jsonl"
WORKLOADS = {
    "W1": "16 requests, 16 adapters",
    "W4": "16 requests, 4 adapters",
    "W2": "16 requests, base",
    "W3": "1 request, base",
    "W5": "16 requests, 16 kinds",
}


def last_run(model: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows = [r for r in rows if r["model"] == model]
    return [r for r in rows if (r["date"], r["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]


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


def main() -> None:
    models = dict.fromkeys(json.loads(line)["model"] for line in RESULTS.read_text().splitlines())
    for model in models:
        rows = last_run(model)
        first = rows[0]
        repeats = max(
            sum((r["engine"], r["form"], r["workload"]) == key for r in rows)
            for key in {(r["engine"], r["form"], r["workload"]) for r in rows}
        )
        print(f"### {model}\n")
        print(
            f"{first['cpu']}, {first['cores']} cores; torch {first['torch']}, transformers "
            f"{first['transformers']}, PEFT {first['peft']}, Python {first['python']}; commit "
            f"{first['commit']}, {first['date']}; fastest of {repeats}.\n"
        )
        print(table(rows) + "\n")


if __name__ == "__main__":
    main()
