"""The workloads of mixed.py, for every engine that is put to them; nothing to be installed."""

from __future__ import annotations

import random
from pathlib import Path

PROMPT, NEW = 64, 64
Answers = list[list[int]]


def prompt(i: int) -> list[int]:
    rng = random.Random(7000 + i)
    return [rng.randrange(10, 30000) for _ in range(PROMPT)]


def workload(name: str) -> list[tuple[list[int], int | None]]:
    """(prompt, adapter number or None for the base) of each request."""
    return {
        "W1": [(prompt(i), i) for i in range(16)],
        "W4": [(prompt(i), i % 4) for i in range(16)],
        "W2": [(prompt(i), None) for i in range(16)],
        "W3": [(prompt(0), None)],
        "W5": [(prompt(i), i) for i in range(16)],
    }[name]


def adapter_folder(models: Path, model: str, i: int) -> Path:
    """Of LoRA number i."""
    return models / f"{model}-lora" / f"a{i:02d}"
