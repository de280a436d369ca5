"""A bar chart as SVG, in plain text: nothing has to be installed to draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

BAR, GAP, LEFT, WIDTH = 12, 14, 280, 520
COLOURS = ("#0b6e4f", "#c8553d", "#e09f3e", "#7a6c5d", "#4f6d8f", "#9c528b")


@dataclass(frozen=True)
class Cluster:
    """Bars under one label, named by their series. floor: marked by a line across them."""

    label: str
    values: Mapping[str, float]
    floor: float | None = None


def bars(title: str, unit: str, clusters: Sequence[Cluster]) -> str:
    """Horizontal bars, one colour a series; every bar ends with its number."""
    series = list(dict.fromkeys(name for cluster in clusters for name in cluster.values))
    most = max(value for cluster in clusters for value in cluster.values.values())
    scale = WIDTH / max(most, 1e-9)
    legend, y = _legend(series)
    marks = [_text(10, 20, title, 14), *legend]
    for cluster in clusters:
        height = BAR * len(cluster.values)
        marks.append(_text(LEFT - 8, y + height / 2 + 4, cluster.label, 11, "end"))
        for i, (name, value) in enumerate(cluster.values.items()):
            length = max(value, 0.0) * scale
            colour = COLOURS[series.index(name) % len(COLOURS)]
            at = y + i * BAR
            marks.append(_rect(LEFT, at, length, BAR - 2, colour))
            marks.append(_text(LEFT + length + 4, at + BAR - 4, f"{value:.1f}", 9))
        if cluster.floor is not None:
            x = LEFT + cluster.floor * scale
            marks.append(
                f'<line x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{y + height}" stroke="#000"/>'
            )
        y += height + GAP
    marks.append(_text(LEFT, y + 6, f"{unit}; the line is the floor of the task's bytes", 10))
    size = f'width="{LEFT + WIDTH + 70}" height="{y + 20}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, white, *marks, "</svg>"]) + "\n"


def _legend(series: Sequence[str]) -> tuple[list[str], float]:
    """Its marks, in as many lines as it needs, and where the bars begin."""
    marks, x, y = list[str](), 10.0, 32.0
    for i, name in enumerate(series):
        width = 30 + 6.5 * len(name)
        if x > 10 and x + width > LEFT + WIDTH:
            x, y = 10.0, y + 16
        marks.append(_rect(x, y, 10, 10, COLOURS[i % len(COLOURS)]))
        marks.append(_text(x + 14, y + 9, name, 11))
        x += width
    return marks, y + 30


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{colour}"/>'


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"
