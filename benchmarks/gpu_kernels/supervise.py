"""A worker that may be started again: a bad access or an endless kernel costs one figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

RESTART = 75
"""The worker's exit status when the device no longer answers it."""


@dataclass(frozen=True)
class Place:
    """Where to go on: the first case of a part that has not been begun, and the part's seconds."""

    part: str
    first: int
    seconds: float

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Place | None:
        text = file.read_text()
        return cls(**json.loads(text)) if text else None


def give_up() -> NoReturn:
    """Ends this process and its hold on the device at once, whatever its threads wait for."""
    sys.stdout.flush()
    os._exit(RESTART)


def run(command: Sequence[str]) -> int:
    """Runs `command --place FILE`, again from the place that it left there as long as it crashes
    or gives up; every start begins at least one case further. Returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "place"
        file.touch()
        begun: Place | None = None
        while True:
            status = subprocess.call([*command, "--place", str(file)])
            place = Place.read(file)
            if not (status < 0 or status == RESTART) or place in (None, begun):
                return status
            print(f"[{status}: going on in a new process, {place}]", flush=True)
            begun = place
