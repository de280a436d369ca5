"""What the commands share."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

BYTES = "Bytes, e.g. 512MiB; auto for no such limit."


def fail(message: str) -> NoReturn:
    """Say what is wrong and exit with code 2."""
    print(f"deltaserve: {message}", file=sys.stderr)
    raise typer.Exit(2)
