"""What was compiled at start-up is all that any step needs, whatever adapters it has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "aot" / "launches.py"


@pytest.mark.parametrize("what", ["group", "layer"])
def test_no_adapter_and_no_mix_leads_to_a_compilation(what: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), what], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    before, during, unforeseen = map(int, run.stdout.split()[-3:])
    assert before > 5
    assert during == 0
    assert unforeseen > 0  # the count does count
