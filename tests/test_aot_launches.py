"""What is compiled at the start is what steps need, whatever adapters they have, and no more."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "aot" / "asked.py"


def test_what_is_asked_for_is_what_is_made() -> None:
    """Of linears of every format, such that no adapter may act on too, norms and decoder layers,
    for every number of tokens that is compiled for, with a table of measurements and without."""
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    cases = [line for line in run.stdout.splitlines() if line.endswith(" forms")]
    alone = [line for line in cases if line.startswith("alone")]
    assert len(alone) == 12 and all(int(line.split()[-2]) > 1 for line in alone)
    assert cases[0] == "embedding: 1 forms"
    others = [line for line in cases[1:] if line not in alone]
    assert len(others) == 16 and all(int(line.split()[-2]) > 40 for line in others)
    assert "missing" not in run.stdout and "unused" not in run.stdout, run.stdout
