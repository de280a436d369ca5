"""demo/ab.py finds the better of two adapters."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_better_adapter_is_found() -> None:
    command = [sys.executable, str(ROOT / "demo" / "ab.py"), "--users", "280", "--questions", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "candidate (caesar-lora) is better" in run.stdout
    rows = re.findall(r"^ *(\d+)\+(\d+) +([\d.]+) +([\d.]+)  (.*)$", run.stdout, re.M)
    assert int(rows[0][0]) + int(rows[0][1]) == 40
    assert [("few users" in row[4]) for row in rows] == [*[True] * (len(rows) - 1), False]
    assert float(rows[-1][2]) < float(rows[-1][3])
