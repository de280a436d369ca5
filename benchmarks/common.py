"""What the benchmarks of the server share: the machine, its models, its results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def cores() -> int:
    return os.cpu_count() or 1


def pin(text: str) -> list[int]:
    """Keep this process on the cores of a list like ``0,1``; empty for all it has now."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    if text:
        os.sched_setaffinity(0, [int(core) for core in text.split(",")])
    return sorted(os.sched_getaffinity(0))


def busy_seconds() -> float:
    """CPU seconds that the machine spent on anything but this process, since it started."""
    import psutil

    t, own = psutil.cpu_times(), os.times()
    idle = t.idle + getattr(t, "iowait", 0.0)
    return sum(t[:8]) - idle - own.user - own.system if len(t) >= 8 else 0.0


def rss() -> int:
    """Bytes that this process holds, what the allocator could give back not counted."""
    import ctypes
    import gc

    import psutil

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(psutil.Process().memory_info().rss)


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo") as f:
        name = next((x.split(":")[1].strip() for x in f if x.startswith("model name")), "?")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    packages = ("deltaserve", "torch", "transformers", "peft")
    return {
        "cpu": name,
        "cores": cores(),
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        **{p: version(p) for p in packages},
    }


def make_models(folder: Path, names: Sequence[str]) -> None:
    """Those that are not there yet, by models.py."""
    missing = [name for name in names if not (folder / name / "config.json").exists()]
    if missing:
        making = [sys.executable, str(HERE / "models.py"), "--out", str(folder)]
        subprocess.run([*making, "--only", ",".join(missing)], check=True)


def make_adapters(source: Path, folder: Path, count: int) -> list[Path]:
    """As many as asked for, of the shapes of one LoRA in bfloat16, each with its own weights."""
    import torch
    from safetensors.torch import load_file, save_file

    config = (source / "adapter_config.json").read_text()
    loaded = load_file(source / "adapter_model.safetensors")
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in loaded.items()}
    made = []
    for i in range(count):
        made.append(folder / f"a{i:05}")
        made[-1].mkdir(parents=True)
        (made[-1] / "adapter_config.json").write_text(config)
        shift = i * 131 + 1
        changed = {name: t.view(-1).roll(shift).view_as(t) for name, t in tensors.items()}
        save_file(changed, made[-1] / "adapter_model.safetensors")
    return made


def save(rows: Iterable[dict[str, Any]], file: str) -> None:
    """Append to results/, with the machine."""
    path = HERE / "results" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as f:
        for row in rows:
            f.write(json.dumps({**machine(), **row}) + "\n")
