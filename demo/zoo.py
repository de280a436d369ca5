"""The zoo as its users see it: what zoo.json says, and the held-out examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "zoo"


@dataclass(frozen=True)
class Entry:
    """One variant. The accuracies are exact match on the skill's held-out examples, of the stored
    form in plain transformers, in float32."""

    name: str
    kind: str
    skill: str
    path: Path
    base_accuracy: float
    accuracy: float


def about(folder: Path = FOLDER) -> dict[str, Any]:
    """zoo.json as it is."""
    found: dict[str, Any] = json.loads((folder / "zoo.json").read_text())
    return found


def entries(folder: Path = FOLDER) -> list[Entry]:
    """The variants, in the order of zoo.json."""
    return [
        Entry(
            name=item["name"],
            kind=item["kind"],
            skill=item["skill"],
            path=folder / item["path"],
            base_accuracy=item["base_accuracy"],
            accuracy=item["accuracy"],
        )
        for item in about(folder)["variants"]
    ]


def held_out(skill: str, folder: Path = FOLDER) -> list[tuple[str, str]]:
    """(prompt, right answer) pairs that no training saw."""
    lines = (folder / "held_out" / f"{skill}.jsonl").read_text().splitlines()
    return [(item["prompt"], item["answer"]) for item in map(json.loads, lines)]
