"""What all commands that talk to a server share."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deltaserve.clients import errors
from deltaserve.clients.client import Client

Address = Annotated[str, typer.Option(envvar="DELTASERVE_ADDRESS", help="HOST:PORT of the server.")]
Ca = Annotated[
    Path | None,
    typer.Option(envvar="DELTASERVE_CA", help="PEM file: connect by TLS, trusting it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait at most.")]
LOCAL = "127.0.0.1:50051"


@contextmanager
def connected(address: str, ca: Path | None) -> Iterator[Client]:
    """A client; its errors end the command with a sentence and exit code 1. What it shows of itself
    is in the environment: arguments can be seen by others."""
    token = os.environ.get("DELTASERVE_TOKEN", "").strip()
    certificate = os.environ.get("DELTASERVE_CERTIFICATE") or None
    key = os.environ.get("DELTASERVE_CERTIFICATE_KEY") or None
    try:
        made = Client(address, token=token, ca=ca, certificate=certificate, key=key)
    except (OSError, ValueError) as error:
        where = f"--ca {ca}, DELTASERVE_CERTIFICATE and DELTASERVE_CERTIFICATE_KEY: {error}"
        Console(stderr=True).print(where, style="red", markup=False)
        raise typer.Exit(2) from None
    try:
        with made as client:
            yield client
    except errors.DeltaserveError as error:
        Console(stderr=True).print(f"{error.code.name}: {error}", style="red", markup=False)
        raise typer.Exit(1) from None


def print_json(value: Any) -> None:
    print(json.dumps(dataclasses.asdict(value), ensure_ascii=False), flush=True)
