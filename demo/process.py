"""A server as a child process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

READY = "listening on "


@contextmanager
def served(arguments: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run ``deltaserve serve`` with these arguments until the block ends; its address and
    process. Raises RuntimeError if it ends before it listens."""
    command = [str(Path(sys.executable).with_name("deltaserve")), "serve", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield _address(process, process.stdout), process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str], output: IO[str]) -> str:
    for line in output:
        if READY in line:
            # The pipe must not fill up, whatever the server prints later.
            threading.Thread(target=output.read, daemon=True).start()
            return line.split(READY)[1].split()[0]
    raise RuntimeError(f"the server ended with status {process.wait()} before it listened")
