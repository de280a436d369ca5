"""What all commands that talk to a server share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
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
    """A client; its errors end the command with a sentence and exit code 1."""
    try:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes()) if ca is not None else None
        with Client(address, credentials=credentials) as client:
            yield client
    except OSError as error:
        Console(stderr=True).print(f"--ca {ca}: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    except errors.DeltaserveError as error:
        Console(stderr=True).print(f"{error.code.name}: {error}", style="red", markup=False)
        raise typer.Exit(1) from None


def print_json(value: Any) -> None:
    print(json.dumps(dataclasses.asdict(value), ensure_ascii=False), flush=True)
