"""The commands for experiments on a running server."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltaserve.clients.cli_common import LOCAL, Address, AsJson, Ca, Timeout, connected
from deltaserve.clients.report_types import ArmReport, Estimate, Report

routes_app = typer.Typer(no_args_is_help=True, help="Routes: feedback on their answers, reports.")


@routes_app.command("feedback")
def feedback(
    request_id: Annotated[str, typer.Argument(help="Of the answer; or give --route, --user.")] = "",
    reward: Annotated[
        float | None, typer.Option(help="How good it was; 0 and 1 for bad and good.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="A further fact; repeatable.")
    ] = None,
    feedback_id: Annotated[str, typer.Option(help="The same again replaces this feedback.")] = "",
    route: Annotated[str, typer.Option(help="What the feedback is of, with --user.")] = "",
    user: Annotated[str, typer.Option(help="Whose feedback it is, with --route.")] = "",
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Say how good an answer was, or how a user of a route fared."""
    labels = {}
    for item in label or ():
        name, sign, text = item.partition("=")
        if not sign:
            raise typer.BadParameter(f"{item}: write NAME=TEXT", param_hint="--label")
        labels[name] = text
    with connected(address, ca) as client:
        found = client.record_feedback(
            request_id,
            reward,
            labels,
            feedback_id=feedback_id,
            route=route,
            user=user,
            timeout=timeout,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print(f"counts for arm {found.arm} of route {found.route}")


@routes_app.command("report")
def report(
    route: Annotated[str, typer.Argument(help="Its name.")],
    level: Annotated[float | None, typer.Option(help="Chance of a wrong finding.")] = None,
    cuped: Annotated[
        bool, typer.Option("--cuped", help="Adjust by rewards from before the experiment.")
    ] = False,
    points: Annotated[int, typer.Option(help="Moments of the history, in the JSON.")] = 0,
    tuned_for: Annotated[
        int | None, typer.Option(help="Users per arm that intervals are tuned for.")
    ] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Compare the arms of a route. The intervals may be looked at as often as one likes."""
    with connected(address, ca) as client:
        found = client.get_report(
            route, level=level, cuped=cuped, points=points, tuned_for=tuned_for, timeout=timeout
        )
    if as_json:
        print(json.dumps(_plain(dataclasses.asdict(found)), ensure_ascii=False))
    else:
        _show(found)


def _plain(value: Any) -> Any:
    """What JSON can say: null for what is not known, which is infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _show(report: Report) -> None:
    console = Console()
    for warning in report.warnings:
        console.print(f"! {warning}", style="yellow", markup=False)
    since = datetime.fromtimestamp(report.start_time)
    print(f"route {report.route.name}, {report.route.state}, counted since {since:%Y-%m-%d %H:%M}")
    table = Table("arm", "requests", "users", "rewarded", "reward", "less control", "detectable")
    for arm in report.arms:
        known = arm.reward is not None and arm.rewarded_users
        table.add_row(
            escape(arm.arm) + (" (shadow)" if arm.shadow else ""),
            str(arm.requests),
            str(arm.users),
            str(arm.rewarded_users),
            _estimate(arm.reward) if known else "",
            _estimate(arm.difference) if known else "",
            f"{arm.detectable:.3g}" if arm.difference is not None else "",
        )
    console.print(table)
    names = list(dict.fromkeys(name for arm in report.arms for name in arm.shares))
    if names:
        table = Table("users with, %", *(escape(arm.arm) for arm in report.arms))
        for name in names:
            shares = [arm.shares.get(name) for arm in report.arms]
            table.add_row(name.replace("_", " "), *(_estimate(s, 100) for s in shares))
        console.print(table)
    table = Table("seconds and tokens", *(escape(arm.arm) for arm in report.arms))
    for name, of in (("first token", "first_token_seconds"), ("to the end", "seconds")):
        for quantile in ("p50", "p90", "p99"):
            cells = [f"{getattr(getattr(arm, of), quantile):.3f}" for arm in report.arms]
            table.add_row(f"{name}, {quantile}", *cells)
    for name in ("prompt_tokens", "completion_tokens"):
        table.add_row(name.replace("_", " "), *(_each(arm, name) for arm in report.arms))
    console.print(table)


def _each(arm: ArmReport, name: str) -> str:
    count: int = getattr(arm, name)
    return f"{count} ({count / max(arm.requests, 1):.1f} a request)"


def _estimate(found: Estimate | None, scale: float = 1.0) -> str:
    if found is None:
        return ""
    low, high = found.low * scale, found.high * scale
    said = f"{found.value * scale:.4g}"
    known = math.isfinite(low)
    return escape(f"{said} [{low:.4g}, {high:.4g}]" if known else f"{said} [not known yet]")
