"""Markdown tables and a plot of what `gpu.py engine` saved, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu_kernels.svg import Cluster, bars

Row = dict[str, Any]


def newest(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """Of each figure the last row, rehearsals left out; of a part that was absent nothing, once it
    has been measured."""
    names = ("shape", "section", "what", "engine", "graphs", "batch", "form")
    real = (row for row in rows if not row.get("rehearsal"))
    found: dict[tuple[Any, ...], Row] = {}
    for row in real:
        if "value" in row:
            part = (row["shape"], row["section"], row["section"], None, row["graphs"], None, None)
            found.pop(part, None)
        found[tuple(row.get(name) for name in names)] = row
    return found


def markdown(rows: Sequence[Row]) -> str:
    """All tables; empty without results."""
    text = []
    for gpu, shape in dict.fromkeys((row["gpu"], row["shape"]) for row in rows):
        chosen = [r for r in rows if (r["gpu"], r["shape"]) == (gpu, shape)]
        found = list(newest(chosen).values())
        if found:
            text.append(_of(found, f"{gpu}: {shape}"))
    return "\n".join(text)


def _of(rows: Sequence[Row], title: str) -> str:
    runs = ", ".join(dict.fromkeys(f"{r['commit']} of {r['date']}" for r in rows))
    last = rows[-1]
    measured = [r for r in rows if "value" in r and r["what"] != "answer"]
    steps = _in_order([r for r in measured if r["what"] == "decode"])
    return "\n".join(
        t
        for t in (
            f"### {title}\n",
            f"torch {last['torch']}, Triton {last['triton']}, Python {last['python']}; "
            f"commit {runs}.\n",
            _table("Decoding", DECODING, steps),
            _kernels([r for r in measured if r.get("kernels")]),
            _table("Goals", GOALS, [r for r in measured if r.get("goal")]),
            _table("Start", FIGURES, [r for r in measured if r["section"] == "start"]),
            _table(
                "Other figures",
                FIGURES,
                [
                    r
                    for r in measured
                    if r["what"] != "decode" and r["section"] != "start" and not r.get("goal")
                ],
            ),
            _absent(rows),
        )
        if t
    )


def _in_order(steps: Sequence[Row]) -> list[Row]:
    """What was measured alike together, in the order of its first row, and by batch."""

    def alike(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("section", "engine", "graphs", "form"))

    order = list(dict.fromkeys(map(alike, steps)))
    return sorted(steps, key=lambda row: (order.index(alike(row)), row["batch"]))


Cells = dict[str, Callable[[Row], str]]


def _cell(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(name) is None else str(row[name])


def _value(row: Row) -> str:
    return f"{row['value']:g} {row['unit']}"


def _share(row: Row) -> str:
    """Of a step's time, what its bytes take at the rate of a copy."""
    floor = row.get("floor_ms")
    return "-" if floor is None else f"{floor:g} ({floor / row['p50_ms']:.0%})"


WHERE: Cells = {"graphs": _cell("graphs"), "batch": _cell("batch")}
DECODING: Cells = {
    "engine": _cell("engine"),
    **WHERE,
    "replayed": lambda row: "-" if row.get("replayed") is None else f"{row['replayed']:.0%}",
    "context": _cell("context"),
    "adapters": _cell("form"),
    "tokens/s": _cell("value"),
    "step p50 ms": _cell("p50_ms"),
    "p99 ms": _cell("p99_ms"),
    "bytes' floor ms (of p50)": _share,
}
GOALS: Cells = {
    "figure": _cell("what"),
    **WHERE,
    "of": _cell("form"),
    "measured": _value,
    "goal": _cell("goal"),
    "met": lambda row: "yes" if row["met"] else "**no**",
}
FIGURES: Cells = {
    "figure": _cell("what"),
    **WHERE,
    "of": _cell("form"),
    "measured": _value,
}


def _table(title: str, cells: Cells, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [list(cells), ["---"] * len(cells), *([f(r) for f in cells.values()] for r in rows)]
    return f"{title}:\n\n" + "\n".join("| " + " | ".join(x) + " |" for x in lines) + "\n"


def _kernels(rows: Sequence[Row]) -> str:
    """What a step's own kernels take, each timed apart."""
    names = list(dict.fromkeys(name for row in rows for name in row["kernels"]))

    def of(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row['kernels'][name]:g}" if name in row["kernels"] else "-"

    cells = {"batch": _cell("batch"), "of": _cell("form"), "launches": _cell("launches")}
    each = {name.removesuffix("_kernel"): of(name) for name in names}
    return _table("Milliseconds of a step's kernels", {**cells, **each, "sum": _value}, rows)


def _absent(rows: Sequence[Row]) -> str:
    lines = dict.fromkeys(
        f"- {r['section']}, graphs {r['graphs']}: {r['absent']}" for r in rows if "absent" in r
    )
    return "Absent:\n\n" + "\n".join(lines) + "\n" if lines else ""


def plot(rows: Sequence[Row]) -> str | None:
    """SVG: milliseconds of a decoding step of the base at each batch, with graphs and without, and
    transformers'; the line is the bytes' floor. None without such rows."""
    for gpu, shape in dict.fromkeys((row["gpu"], row["shape"]) for row in rows):
        found = [
            r
            for r in newest(r for r in rows if (r["gpu"], r["shape"]) == (gpu, shape)).values()
            if r["what"] == "decode" and r.get("form") == "base" and "value" in r
        ]
        clusters = []
        for batch in sorted({r["batch"] for r in found}):
            here = [r for r in found if r["batch"] == batch]
            values = {_series(r): float(r["p50_ms"]) for r in here}
            floor = next((r["floor_ms"] for r in here if r.get("floor_ms")), None)
            clusters.append(Cluster(f"batch {batch}", values, floor))
        if clusters:
            return bars(f"A decoding step, {shape}, {gpu}", "ms", clusters)
    return None


def _series(row: Row) -> str:
    graphs = {"auto": ", graphs", "off": ", launch by launch"}.get(row["graphs"] or "", "")
    return f"{row['engine']}{graphs}"
