"""The commands that make, show and change routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from deltaserve.clients.cli_common import (
    LOCAL,
    Address,
    AsJson,
    Ca,
    Timeout,
    connected,
    print_json,
)
from deltaserve.clients.cli_routes import routes_app
from deltaserve.clients.route_types import Route, RouteArm, RouteOptions

__all__ = ["routes_app"]

Name = Annotated[str, typer.Argument(help="The route's name.")]
NOT_PUT = ("name", "arms", "state", "reason", "weights", "start_time", "update_time")


@routes_app.command("put")
def put_route(
    name: Name,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="An adapter, or nothing for the base; repeatable."),
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Of an arm; 1 if left out.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="All of it as JSON, as `routes get --json` prints it.")
    ] = None,
    control: Annotated[str, typer.Option(help="The arm to compare with; the first.")] = "",
    etag: Annotated[str, typer.Option(help="Only if it is still the route's.")] = "",
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Make a route, or change it."""
    if (file is None) == (not arm):
        raise typer.BadParameter("give arms or a file", param_hint="--arm")
    arms, options = _arms(arm or (), weight or ()), RouteOptions()
    if file is not None:
        arms, options = _read(file)
    if control:
        options["control"] = control
    if etag:
        options["etag"] = etag
    with connected(address, ca) as client:
        try:
            route = client.put_route(name, arms, timeout=timeout, **options)
        except (TypeError, AttributeError, KeyError) as error:
            raise typer.BadParameter(f"{file}: {error}", param_hint="--file") from None
    _show(route, as_json)


def _arms(arms: list[str] | tuple[()], weights: list[str] | tuple[()]) -> list[RouteArm]:
    found: dict[str, dict[str, Any]] = {}
    for item in arms:
        name, _, model = item.partition("=")
        found[name] = {"name": name, "model": model}
    for item in weights:
        name, _, number = item.partition("=")
        try:
            found[name]["weight"] = float(number)
        except (KeyError, ValueError):
            text = f"{item}: write NAME=NUMBER, with a NAME of --arm"
            raise typer.BadParameter(text, param_hint="--weight") from None
    return cast(list[RouteArm], list(found.values()))


def _read(file: Path) -> tuple[list[RouteArm], RouteOptions]:
    """What `get --json` printed, or the part of it that can be put. Its etag is for --etag."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        arms = [{k: v for k, v in one.items() if k != "digests" and v} for one in given["arms"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise typer.BadParameter(f"{file}: {error!r}", param_hint="--file") from None
    for one, was in zip(arms, given["arms"], strict=True):
        if "weight" in was:
            one["weight"] = was["weight"]
    options = {k: v for k, v in given.items() if k not in (*NOT_PUT, "etag") and v}
    return cast(list[RouteArm], arms), cast(RouteOptions, options)


@routes_app.command("list")
def list_routes(as_json: AsJson = False, address: Address = LOCAL, ca: Ca = None) -> None:
    """All routes, with the weights that hold now."""
    with connected(address, ca) as client:
        found = client.list_routes()
    if as_json:
        for route in found:
            print_json(route)
        return
    table = Table("name", "state", "arms", "why")
    for route in found:
        table.add_row(route.name, route.state, _weights(route), route.reason)
    Console().print(table)


@routes_app.command("get")
def get_route(name: Name, as_json: AsJson = False, address: Address = LOCAL, ca: Ca = None) -> None:
    """One route as it is now."""
    with connected(address, ca) as client:
        _show(client.get_route(name), as_json)


@routes_app.command("roll-back")
def roll_back_route(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why, for the log.")] = "",
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Give all of its requests to its control, at once."""
    with connected(address, ca) as client:
        _show(client.roll_back_route(name, reason, timeout=timeout), as_json)


@routes_app.command("delete")
def delete_route(
    name: Name,
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Take it away; what was recorded of it stays."""
    with connected(address, ca) as client:
        client.delete_route(name, timeout=timeout)
    print(json.dumps({"name": name}) if as_json else f"{name} is deleted")


def _weights(route: Route) -> str:
    shown = [f"{arm} {weight:.1%}" for arm, weight in sorted(route.weights.items())]
    shown += [f"{arm.name} in the shadow of {arm.shadow:.0%}" for arm in route.arms if arm.shadow]
    return ", ".join(shown)


def _show(route: Route, as_json: bool) -> None:
    if as_json:
        print_json(route)
        return
    facts = [route.name, route.state, route.reason, _weights(route), f"etag {route.etag}"]
    print("  ".join(fact for fact in facts if fact))
    for arm in route.arms:
        what = arm.model or ", ".join(
            f"{a['name']} x {a.get('strength', 1):g}" for a in arm.adapters
        )
        digests = " ".join(digest[:12] for digest in arm.digests)
        control = "(control)" if arm.name == route.control else ""
        print(
            "  ".join(fact for fact in ("  " + arm.name, control, what or "base", digests) if fact)
        )
    for field in ("layer", "ramp", "guardrails", "bandit"):
        if value := getattr(route, field):
            print(f"    {field}: {json.dumps(value)}")
