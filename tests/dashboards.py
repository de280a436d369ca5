"""The PromQL of the dashboard and of the alert rules, and what it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

DOCS = Path(__file__).parents[1] / "docs"
ALERTS = DOCS / "alerts.yml"
DASHBOARD = DOCS / "grafana" / "deltaserve.json"
ADDED = {"instance", "job", "le"}
"""Labels that Prometheus and histograms have by themselves."""


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())
    variables = [v["definition"] for v in panels["templating"]["list"] if v["type"] == "query"]
    shown = [t["expr"] for panel in panels["panels"] for t in panel.get("targets", ())]
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [*variables, *shown, *(rule["expr"] for group in groups for rule in group["rules"])]


def names(expression: str) -> set[str]:
    """Of metrics, as they are scraped."""
    return set(re.findall(r"\b((?:deltaserve|process|vllm)[_:]\w+)", expression))


def selected(expression: str) -> Iterator[tuple[str, str]]:
    """(name, label) of every label that a metric is selected by."""
    for name, inside in re.findall(r"(\w+)\{([^}]*)\}", expression):
        yield from ((name, label) for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))


def grouped(expression: str) -> set[str]:
    """Labels that sums are made by."""
    lists = re.findall(r"\bby \(([^)]*)\)", expression)
    return {label.strip() for one in lists for label in one.split(",")}
