"""Markdown tables and a plot of what results/gpu*.jsonl say, for docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_kernels.svg import Cluster, bars

Row = dict[str, Any]
LAYER = ("qkv", "o", "gate_up", "down")
"""The groups of one layer of Llama-3.1-8B."""
OURS = "deltaserve"


@dataclass(frozen=True)
class Figure:
    """Microseconds of one layer. floor: of the same task. nodes: graph nodes, 0 if not counted."""

    us: float
    floor: float
    nodes: float


class Results:
    """The newest row of each figure on one GPU."""

    def __init__(self, rows: Iterable[Row], gpu: str) -> None:
        self.gpu = gpu
        self.rows: dict[tuple[Any, ...], Row] = {}
        for row in rows:
            if row["gpu"] == gpu:
                self.rows[_key(row)] = row

    def of(self, part: str) -> list[Row]:
        return [row for row in self.rows.values() if row["part"] == part]

    def cases(self, part: str) -> list[tuple[int, int, str]]:
        """(tokens, adapters, form) of the steps of a part, in the order measured."""
        rows = (r for r in self.of(part) if r.get("adapters") is not None)
        return list(dict.fromkeys((r["tokens"], r["adapters"], r["form"]) for r in rows))

    def engines(self, part: str) -> list[str]:
        return list(dict.fromkeys(row["engine"] for row in self.of(part)))

    def layer(
        self, part: str, engine: str, what: str, case: tuple[Any, ...]
    ) -> Figure | str | None:
        """The sum over a layer's groups; "absent" or "wrong" if one was; None if not all are
        there. case: (tokens, adapters or None, form)."""
        found = [self.rows.get((part, engine, what, group, *case)) for group in LAYER]
        if any(row is not None and "absent" in row for row in found):
            return "absent"
        if any(row is not None and "wrong" in row for row in found):
            return "wrong"
        rows = [row for row in found if row is not None]
        if len(rows) < len(LAYER):
            return None
        return Figure(
            sum(row["us"] for row in rows),
            sum(row["floor_us"] for row in rows),
            sum(row["nodes"] or 0 for row in rows),
        )


def _key(row: Row) -> tuple[Any, ...]:
    names = ("part", "engine", "what", "group", "tokens", "adapters", "form")
    return tuple(row.get(name) for name in names)


def load(folder: Path) -> list[Row]:
    """Every row of the folder's gpu*.jsonl, oldest file first."""
    lines: list[str] = []
    for file in sorted(folder.glob("gpu*.jsonl")):
        lines += file.read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def markdown(rows: Sequence[Row]) -> str:
    """All tables; empty without results."""
    return "\n".join(_of_gpu(Results(rows, gpu)) for gpu in dict.fromkeys(r["gpu"] for r in rows))


def _of_gpu(results: Results) -> str:
    rows = list(results.rows.values())
    runs = ", ".join(dict.fromkeys(f"{r['commit']} of {r['date']}" for r in rows))
    first = rows[-1]
    text = [
        f"### {results.gpu}\n",
        f"torch {first['torch']}, Triton {first['triton']}, Python {first['python']}; "
        f"commit {runs}. Microseconds of one layer (qkv, o, gate and up, down).\n",
        _ceilings(results),
        _base(results),
        *(_deltas(results, part) for part in ("lowrank", "bit", "sparse")),
        _mixed(results),
        _reasons(results),
    ]
    return "\n".join(t for t in text if t)


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ceilings(results: Results) -> str:
    found = [r for r in results.of("ceilings") if "value" in r]
    if not found:
        return ""
    return _table(
        ["ceiling", "measured"], [(r["what"], f"{r['value']} {r['unit']}") for r in found]
    )


def _base(results: Results) -> str:
    rows = results.of("base")
    tokens = sorted({r["tokens"] for r in rows})
    body = []
    for engine, form in dict.fromkeys((r["engine"], r["form"]) for r in rows):
        figures = [results.layer("base", engine, "base", (m, None, form)) for m in tokens]
        body.append([engine, form, *(_cell(f, share=True) for f in figures)])
    if not body:
        return ""
    return "Base (share of the floor):\n\n" + _table(
        ["kernels", "weights", *(f"M={m}" for m in tokens)], body
    )


def _deltas(results: Results, part: str) -> str:
    """What the deltas add to a layer: as a difference of two measurements where they are computed
    with the base product, else as what is launched after it."""
    peers = [e for e in results.engines(part) if e != OURS]
    body = []
    for case in results.cases(part):
        ours, base = added(results, part, OURS, case), results.layer(part, OURS, "base", case)
        figures = [added(results, part, peer, case) for peer in peers]
        cells = [_cell(base), _cell(ours), *(_cell(f) for f in figures)]
        tokens, adapters, form = case
        body.append([form, str(tokens), str(adapters), *cells])
    if not body:
        return ""
    head = ["deltas", "tokens", "adapters", "int4 base", f"{OURS} adds"]
    title = {"lowrank": "LoRA", "bit": "1-bit", "sparse": "Sparse"}[part]
    return f"{title}:\n\n" + _table([*head, *(f"{peer} adds" for peer in peers)], body)


def added(
    results: Results, part: str, engine: str, case: tuple[int, int, str]
) -> Figure | str | None:
    """The base with the deltas less the base alone, in time, floor and launches; or the deltas by
    themselves, of an engine that launches them apart."""
    apart = results.layer(part, engine, "deltas", case)
    if apart is not None:
        return apart
    whole, base = (results.layer(part, engine, what, case) for what in ("base+deltas", "base"))
    if isinstance(whole, Figure) and isinstance(base, Figure):
        return Figure(whole.us - base.us, whole.floor - base.floor, whole.nodes - base.nodes)
    return whole if isinstance(whole, str) else base if isinstance(base, str) else None


def _mixed(results: Results) -> str:
    body = []
    for case in results.cases("mixed"):
        tokens, adapters, form = case
        for engine in results.engines("mixed"):
            for what in ("base", "base+deltas", "deltas"):
                figure = results.layer("mixed", engine, what, case)
                if figure is not None:
                    where = [f"{form}, {tokens} tokens, {adapters} adapters", engine, what]
                    body.append([*where, _cell(figure, share=True)])
    if not body:
        return ""
    return "Mixed batch:\n\n" + _table(["batch", "kernels", "what", "us (share of floor)"], body)


def _reasons(results: Results) -> str:
    """Why figures are missing, each reason once."""
    found = (
        f"- {r.get('engine', '')} ({r['part']}): {r['absent']}"
        for r in results.rows.values()
        if "absent" in r
    )
    lines = list(dict.fromkeys(found))
    return "Absent:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _cell(figure: Figure | str | None, share: bool = False) -> str:
    if not isinstance(figure, Figure):
        return figure or "-"
    shares = f" ({figure.floor / figure.us:.0%})" if share else ""
    nodes = f", {figure.nodes:.0f} nodes" if figure.nodes and not share else ""
    return f"{figure.us:.1f}{shares}{nodes}"


def plot(rows: Sequence[Row], part: str = "lowrank") -> str | None:
    """SVG: what each engine adds to a layer, case by case; None without results of that part."""
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        results, clusters = Results(rows, gpu), list[Cluster]()
        for case in results.cases(part):
            figures = {e: added(results, part, e, case) for e in results.engines(part)}
            values = {e: f.us for e, f in figures.items() if isinstance(f, Figure)}
            own = figures.get(OURS)
            if values:
                tokens, adapters, form = case
                label = f"{form}: {tokens} tokens, {adapters} adapters"
                floor = own.floor if isinstance(own, Figure) else None
                clusters.append(Cluster(label, values, floor))
        if clusters:
            return bars(f"Added to a layer of Llama-3.1-8B, {gpu}", "us", clusters)
    return None
