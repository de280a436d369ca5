"""The committed stubs are what the protos give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HERE = ROOT / "proto" / "deltaserve"


def stubs(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.glob("*/*_pb2*.py*")}


def test_the_stubs_are_up_to_date(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["make", "stubs", f"PYTHON={sys.executable}", f"STUBS={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
    )
    made = stubs(tmp_path / "deltaserve")
    committed = stubs(HERE)
    assert len(made) == 4 * len(list(HERE.glob("*/*.proto")))
    assert made == committed, "run `make stubs`"
