"""The commands that talk to a running server; `deltaserve` has them too."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table

from deltaserve.clients import errors, types
from deltaserve.clients.cli_common import LOCAL, Address, AsJson, Ca, Timeout, connected, print_json
from deltaserve.clients.cli_keys import keys_app, tenants_app
from deltaserve.clients.cli_put_routes import routes_app
from deltaserve.clients.requests import (
    Combination,
    CombinationMember,
    Options,
    Prompt,
    Weighted,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
adapters_app = typer.Typer(no_args_is_help=True, help="The adapters that the server knows.")
app.add_typer(adapters_app, name="adapters")
app.add_typer(routes_app, name="routes")
app.add_typer(keys_app, name="keys")
app.add_typer(tenants_app, name="tenants")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    model: Annotated[str, typer.Option(help="An adapter; the base if left out.")] = "",
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=STRENGTH; several add up.")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATTERN", help="It acts on these modules alone; repeatable."),
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WEIGHT", help="Combine distributions; no NAME is the base."),
    ] = None,
    rule: Annotated[str, typer.Option(help="Of members: mean or product.")] = "mean",
    plausibility: Annotated[
        float, typer.Option(help="Of members: exclude what the first finds so improbable.")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the end of text.")] = False,
    json_schema: Annotated[
        str | None, typer.Option(help="JSON that this schema allows: a file, or the schema itself.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Text that it matches as a whole.")] = None,
    grammar: Annotated[
        str | None, typer.Option(help="Text of this grammar in Lark's syntax: a file, or itself.")
    ] = None,
    choice: Annotated[list[str] | None, typer.Option(help="One of these texts.")] = None,
    bad_word: Annotated[list[str] | None, typer.Option(help="Never generated.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Generate so many, print the best.")] = None,
    echo: Annotated[bool, typer.Option(help="Print the prompt first.")] = False,
    draft_tokens: Annotated[
        int | None, typer.Option(help="Most tokens drafted by prompt lookup in a step; 0 is off.")
    ] = None,
    user: Annotated[str, typer.Option(help="On whose behalf; users share the machine.")] = "",
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    max_wait: Annotated[
        float | None, typer.Option(help="Most seconds until the first token.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="The prompt is the user's turn of a chat.")] = False,
    stream: Annotated[bool, typer.Option(help="Print pieces as they come.")] = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Continue a prompt."""
    text = sys.stdin.read() if prompt == "-" else prompt
    asked: Prompt = [{"role": "user", "content": text}] if chat else text
    adapters = _masked([_weighted(item) for item in adapter or ()], modules or ())
    given: dict[str, Any] = {
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
        "json_schema": json_schema and _content(json_schema, "{"),
        "best_of": best_of,
        "echo": echo or None,
        "regex": regex,
        "grammar": grammar and _content(grammar, "start:"),
        "choice": choice or None,
        "bad_words": bad_word or None,
        "user": user,
        "priority": priority,
        "max_wait_seconds": max_wait,
        "timeout": timeout,
    }
    if draft_tokens is not None:
        given["speculation"] = {"draft_tokens": draft_tokens}
    options = Options(**{k: v for k, v in given.items() if v is not None})  # type: ignore[typeddict-item]
    if member:
        options["combination"] = _combined(member, rule, plausibility)
    with connected(address, ca) as client:
        if as_json or not stream or best_of is not None:
            answer = client.generate(
                asked,
                model,
                adapters,
                max_tokens,
                temperature,
                ignore_eos=ignore_eos,
                **options,
            )
            if as_json:
                print_json(answer)
            else:
                print(answer.text)
            return
        for piece in client.stream(
            asked, model, adapters, max_tokens, temperature, ignore_eos=ignore_eos, **options
        ):
            print(piece.text, end="", flush=True)
        print()


def _content(given: str, own: str) -> str:
    """Of the file that is named, unless `given` has `own`, which is in no name of a file."""
    if own in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{given}: {error}") from None


def _weighted(item: str, hint: str = "--adapter") -> tuple[str, float]:
    name, sign, strength = item.partition("=")
    try:
        return name, float(strength) if sign else 1.0
    except ValueError:
        raise typer.BadParameter(f"{item}: write NAME or NAME=NUMBER", param_hint=hint) from None


def _combined(members: Sequence[str], rule: str, plausibility: float) -> Combination:
    if rule not in ("mean", "product"):
        raise typer.BadParameter(f"{rule}: write mean or product", param_hint="--rule")
    pairs = [_weighted(item, "--member") for item in members]
    return Combination(
        members=[CombinationMember(model=name, weight=weight) for name, weight in pairs],
        rule=cast(Literal["mean", "product"], rule),
        plausibility=plausibility,
    )


def _masked(adapters: list[tuple[str, float]], modules: Sequence[str]) -> list[Weighted]:
    found = [Weighted(name=name, strength=strength, modules=[]) for name, strength in adapters]
    for item in modules:
        name, sign, pattern = item.partition("=")
        chosen = next((a for a in found if a["name"] == name), None)
        if not sign or chosen is None:
            raise typer.BadParameter(
                f"{item}: write NAME=PATTERN, with a NAME of --adapter", param_hint="--modules"
            )
        chosen["modules"] = [*chosen["modules"], pattern]
    return found


@app.command()
def info(as_json: AsJson = False, address: Address = LOCAL, ca: Ca = None) -> None:
    """What the server serves, and how full it is."""
    with connected(address, ca) as client:
        found = client.server_info()
    if as_json:
        print_json(found)
        return
    table = Table(show_header=False, box=None)
    for name, value in dataclasses.asdict(found).items():
        if name == "adapter_fits":
            for fit in found.adapter_fits:
                room = f"{fit.count} of {_bytes(fit.nbytes)}"
                table.add_row(f"{fit.kind} adapters fit", room)
            continue
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
        if name.endswith("_bytes"):
            shown = _bytes(value)
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


@app.command()
def health(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 5.0,
    wait: Annotated[float, typer.Option(help="Seconds to wait until it is ready.")] = 0.0,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Exit code 0 if the server takes requests, else 1."""
    with connected(address, ca) as client:
        if wait > 0:
            client.wait_ready(wait)
        elif not client.ready(timeout=timeout):
            print("not serving")
            raise typer.Exit(1)
    print("serving")


@adapters_app.command("list")
def list_adapters(as_json: AsJson = False, address: Address = LOCAL, ca: Ca = None) -> None:
    """All adapters."""
    with connected(address, ca) as client:
        found = client.list_adapters()
    if as_json:
        for adapter in found:
            print_json(adapter)
        return
    table = Table("name", "state", "format", "primitives", "memory", "requests", "last use")
    for a in found:
        table.add_row(
            a.name + (" (pinned)" if a.pinned else ""),
            a.state,
            a.format,
            ", ".join(a.primitives),
            _bytes(a.resident_bytes),
            str(a.in_flight),
            _time(a.last_used),
        )
    Console().print(table)


@adapters_app.command("load")
def load_adapter(
    name: Annotated[str, typer.Argument(help="What requests will call it.")],
    uri: Annotated[str, typer.Argument(help="A folder on the server.")],
    pinned: Annotated[bool, typer.Option(help="Never evict it.")] = False,
    register_only: Annotated[
        bool, typer.Option(help="Check it; the first request that asks for it loads it.")
    ] = False,
    shared: Annotated[bool, typer.Option(help="Every tenant may use it.")] = False,
    parent: Annotated[str, typer.Option(help="The adapter that its files are relative to.")] = "",
    task_id: Annotated[
        int | None, typer.Option(min=0, help="Which task of an adapter that holds several.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="Largest relative error of a smaller form; 0: exact forms only.")
    ] = 0.0,
    allow_base_mismatch: Annotated[
        bool, typer.Option(help="Also if it was made for another base of the same shapes.")
    ] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Register and load an adapter."""
    with connected(address, ca) as client:
        adapter = client.load_adapter(
            name,
            uri,
            pinned,
            register_only=register_only,
            shared=shared,
            timeout=timeout,
            parent=parent,
            task_id=task_id,
            max_error=max_error,
            allow_base_mismatch=allow_base_mismatch,
        )
        _show(adapter, as_json)


@adapters_app.command("unload")
def unload_adapter(
    name: Annotated[str, typer.Argument(help="Its name.")],
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Wait for an adapter's requests and free it."""
    with connected(address, ca) as client:
        freed = client.unload_adapter(name, timeout=timeout)
    print(json.dumps({"name": name, "freed_bytes": freed}) if as_json else f"{_bytes(freed)} freed")


@adapters_app.command("pin")
def pin_adapter(
    name: Annotated[str, typer.Argument(help="Its name.")],
    off: Annotated[bool, typer.Option("--off", help="Let it be evicted again.")] = False,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Keep an adapter in memory."""
    with connected(address, ca) as client:
        _show(client.pin_adapter(name, not off), as_json)


@adapters_app.command("watch")
def watch_adapters(
    timeout: Timeout = None, as_json: AsJson = False, address: Address = LOCAL, ca: Ca = None
) -> None:
    """Print every change of state, until interrupted."""
    with connected(address, ca) as client:
        try:
            for change in client.watch_adapters(timeout=timeout):
                for adapter in change.adapters:
                    _show(adapter, as_json)
        except errors.DeadlineExceeded:
            return
        except KeyboardInterrupt:
            return


def _show(adapter: types.Adapter, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
        return
    facts = [adapter.name, adapter.state, adapter.format, _bytes(adapter.resident_bytes)]
    facts += [adapter.digest[:12], adapter.error]
    print("  ".join(fact for fact in facts if fact), flush=True)
    for note in adapter.notes:
        print(f"  {note}", flush=True)


def _bytes(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S") if seconds else "never"


def main() -> None:
    """Entry point of ``python -m deltaserve.clients``."""
    app()
