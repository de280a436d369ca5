"""Rows of results/gpu.jsonl: one JSON object a figure, with the machine it was measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton

FOLDER = Path(__file__).parents[1]
RESULTS = FOLDER / "results" / "gpu.jsonl"


def machine(commit: str | None = None) -> dict[str, Any]:
    """commit: where the folder is no git checkout."""
    return {
        **_device(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "deltaserve": _version("deltaserve"),
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None, "sms": 0, "l2_mb": 0, "memory_gb": 0}
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "sms": found.multi_processor_count,
        "l2_mb": found.L2_cache_size >> 20,
        "memory_gb": round(found.total_memory / 2**30),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


def _commit() -> str:
    command = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "?"
    return done.stdout.strip() or "?"


class Recorder:
    """Appends each row as soon as it is known: a run that is killed loses nothing."""

    def __init__(self, file: Path | None, commit: str | None = None) -> None:
        self.file, self.machine = file, machine(commit)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        print(line(row), flush=True)
        if self.file is None:
            return
        with self.file.open("a") as f:
            f.write(json.dumps({**self.machine, **row}) + "\n")
            f.flush()
            os.fsync(f.fileno())


def line(row: dict[str, Any]) -> str:
    """A row as one line for the terminal."""
    named = ("group", "tokens", "adapters", "form", "batch", "context", "graphs")
    where = " ".join(f"{k}={row[k]}" for k in named if row.get(k) is not None)
    head = f"{row['part']:9} {where:48} {row.get('engine', ''):34} {row.get('what', ''):11}"
    if "absent" in row:
        return f"{head} absent: {row['absent']}"
    if "wrong" in row:
        return f"{head} WRONG: relative error {row['wrong']:.2e}"
    if "value" in row:
        met = {None: "", True: ", met", False: ", NOT MET"}[row.get("met")]
        goal = f" (goal {row['goal']}{met})" if row.get("goal") else ""
        return f"{head} {row['value']:.5g} {row['unit']}{goal}"
    moved = max(row["rounds"]) - min(row["rounds"])
    floor = f" floor {row['floor_us']:8.2f} ({row['fraction']:4.0%})" if row.get("floor_us") else ""
    nodes = f" {row['nodes']:.0f} nodes" if row.get("nodes") else ""
    return f"{head} {row['us']:9.2f} us +-{moved:.2f}{floor}{nodes}"
