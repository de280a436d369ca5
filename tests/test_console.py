"""The console in a real browser, before a real server with the zoo: every page, with a key, without
one script or request that is not its own, and readable for those who do not see it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaserve.server.identity import token
from deltaserve.server.identity.caller import Role

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "demo" / "zoo"
MARKUP = "<img src=x onerror=alert(1)>"
SECONDS = 20_000
"""Of the browser, in milliseconds: for what takes one of ours on a busy machine."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The console's address, and a key with every role."""
    name, key = token.make()
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    roles = json.dumps([role.value for role in Role])
    keys.write_text(
        f'[keys.{name}]\ntenant = "acme"\nroles = {roles}\nsha256 = "{token.digest(key)}"\n'
    )
    command = [
        sys.executable,
        "-m",
        "deltaserve.server",
        "serve",
        "--port",
        "0",
        "--http-port",
        "0",
    ]
    command += ["--base", str(ZOO / "base"), "--adapter-root", str(ZOO), "--keys", str(keys)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and process.stdout is not None
        try:
            for line in process.stderr:
                if found := re.search(rb"http://[\d.]+:\d+(?=/v1)", line):
                    process.stdout.readline()
                    yield f"{found[0].decode()}/console/", key
                    break
            else:
                pytest.fail("the server did not start")
        finally:
            process.terminate()
            process.stderr.read()


@pytest.fixture(scope="module")
def page(server: tuple[str, str]) -> Iterator[Any]:
    """One page for all tests here, which go on from where the one before ended: the key is in its
    memory alone."""
    address, _ = server
    wrong: list[str] = []
    with sync_api.sync_playwright() as p:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = p.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: wrong.append(f"{error}"))
        page.on(
            "console", lambda said: "Failed to load" in said.text or wrong.append(f"{said.text}")
        )
        origin = address.removesuffix("console/")
        page.on("request", lambda r: r.url.startswith((origin, "data:")) or wrong.append(r.url))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        yield page
        browser.close()
    assert not wrong, "errors, breaches of the policy, or requests to others"


def visit(page: Any, name: str) -> None:
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("heading", name=name, exact=True).wait_for()


def accessible(page: Any) -> None:
    """In light and dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(page).response["violations"]
        serious = [v for v in found if v["impact"] in ("serious", "critical")]
        shown = [(v["id"], [node["html"] for node in v["nodes"]][:3]) for v in serious]
        assert not shown, (scheme, shown)


def test_a_key_is_asked_for(page: Any, server: tuple[str, str]) -> None:
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("there is no API key").wait_for()
    accessible(page)
    dialog.get_by_label("API key").fill("ds_wrong")
    dialog.get_by_label("API key").press("Enter")
    page.get_by_text("the API key is not valid").wait_for()
    dialog.get_by_label("API key").fill(server[1])
    dialog.get_by_role("button", name="Use it").click()
    page.get_by_text("demo/zoo/base · float32").wait_for()
    kept = "localStorage.length + sessionStorage.length + document.cookie.length"
    assert page.evaluate(f"() => {kept}") == 0


def test_an_adapter_is_loaded_and_pinned(page: Any) -> None:
    visit(page, "Adapters")
    page.get_by_role("button", name="Load an adapter").press("Enter")
    dialog = page.get_by_role("dialog")
    for name, folder in (("x", "../.."), ("sorter", "sort-ia3")):
        dialog.get_by_label("Name").fill(name)
        dialog.get_by_label("Folder").fill(folder)
        dialog.get_by_role("button", name="Load", exact=True).click()
        if name == "x":
            dialog.get_by_role("alert").get_by_text("'../..'").wait_for()
            accessible(page)
    row = page.locator("tr[data-adapter=sorter]")
    row.locator(".state.ready").wait_for()
    assert "peft-ia3" in row.inner_text() and "Scale" in row.inner_text()
    row.get_by_role("button", name="pin sorter", exact=True).click()
    row.locator("[aria-pressed=true]").wait_for()
    page.get_by_label("Search").fill("nothing like it")
    page.get_by_text("0 of").wait_for()
    page.get_by_label("Search").fill("IA3")
    row.wait_for()
    accessible(page)


def test_two_answers_side_by_side(page: Any) -> None:
    visit(page, "Playground")
    page.get_by_label("Prompt").fill("task: fig =")
    page.get_by_label("adapter, route or base").nth(1).fill("sorter")
    page.get_by_role("button", name="Add a column").click()
    page.get_by_label("adapter, route or base").nth(2).fill(MARKUP)
    page.get_by_role("button", name="Run").click()
    columns = page.locator(".column")
    for i in (0, 1):
        columns.nth(i).locator("[data-state=finished]").wait_for()
    answers = [column.locator("pre").inner_text() for column in columns.all()[:2]]
    assert answers == ["fig", "fgi"], "the base copies, the adapter sorts"
    assert "6 in, 4 out" in columns.nth(1).inner_text()
    assert columns.nth(1).locator(".token").count() == len("fgi")
    columns.nth(2).locator("[data-state=failed]").wait_for()
    assert MARKUP in columns.nth(2).locator(".alert").inner_text()
    columns.nth(2).get_by_role("button", name="remove").click()
    columns.nth(1).get_by_label("strength").fill("0")
    columns.nth(1).get_by_role("button", name="+ compose").click()
    page.get_by_label("Prompt").press("Control+Enter")
    page.locator(".column pre", has_text="fig").nth(1).wait_for()
    accessible(page)


def test_answers_are_stopped(page: Any) -> None:
    held: list[Any] = []
    page.route("**/v1/completions", lambda route: held.append(route))
    page.get_by_role("button", name="Run").click()
    page.locator("[data-state=running]").nth(1).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("[data-state=stopped]").nth(1).wait_for()
    page.unroute("**/v1/completions")


def test_the_overview_is_drawn(page: Any) -> None:
    visit(page, "Overview")
    page.locator(".chart svg path").nth(20).wait_for(state="attached")
    table = page.get_by_role("region", name="Traffic")
    table.get_by_role("rowheader", name="sorter", exact=True).wait_for()
    assert len(page.screenshot()) > 20_000
    accessible(page)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1200, "height": 900})


def test_a_route_is_put_and_rolled_back(page: Any) -> None:
    visit(page, "Routes")
    page.get_by_role("button", name="New route").click()
    arms = [{"name": "plain"}, {"name": "sorted", "model": "sorter", "weight": 3}]
    editor = page.get_by_label("Route, as in")
    for route in ({"name": "r", "arms": []}, {"name": "r", "arms": arms}):
        editor.fill(json.dumps(route))
        page.get_by_role("button", name="Put").click()
        if not route["arms"]:
            page.get_by_role("dialog").get_by_role("alert").get_by_text("arms").wait_for()
    page.get_by_role("cell", name="75 %").wait_for()
    page.get_by_role("button", name="Roll back").click()
    page.get_by_label("Why, for the log").fill(MARKUP)
    page.get_by_role("button", name="Roll it back").click()
    page.locator("[data-reason]", has_text=MARKUP).wait_for()
    page.get_by_role("cell", name="100 %").wait_for()
    assert page.get_by_role("button", name="Roll back").is_disabled()
    assert page.locator("img").count() == 0
    accessible(page)


def test_a_report_is_drawn(page: Any) -> None:
    """Made up: intervals that are not known yet, an arm that is better, a broken assignment."""

    def estimate(value: float, low: Any, high: Any) -> dict[str, Any]:
        return {"value": value, "low": low, "high": high}

    def arm(name: str, **more: Any) -> dict[str, Any]:
        return {
            "arm": name,
            "reward": estimate(0.5, "-Infinity", "Infinity"),
            "shares": {"error": estimate(0.01, 0, 0.03)},
            **more,
        }

    better = estimate(0.2, 0.125, 0.3)
    points = [
        {
            "time": f"2026-11-{day:02}T00:00:00Z",
            "arm": name,
            "reward": estimate(0.5, 0.5 - 1 / day, 0.5 + 1 / day),
            **({"difference": better} if name == "sorted" else {}),
        }
        for day in range(1, 20)
        for name in ("plain", "sorted")
    ]
    report = {
        "arms": [arm("plain"), arm("sorted", difference=better)],
        "sampleRatio": {"mismatch": True, "anytimePValue": 0.0002},
        "history": points,
        "warnings": [MARKUP],
    }
    path = "**/deltaserve.v1.RouteService/GetReport"
    page.route(path, lambda route: route.fulfill(json=report))
    visit(page, "Adapters")
    visit(page, "Routes")
    page.get_by_text("p = 0.00020").wait_for()
    page.get_by_role("alert").get_by_text(MARKUP).wait_for()
    table = page.get_by_role("region", name="Report by arm")
    assert "0.500 [\u2212∞, ∞]" in table.inner_text()
    assert "0.200 [0.125, 0.300] better" in table.inner_text()
    assert "1.0 % [0 %, 3.0 %]" in table.inner_text()
    for chart, bands in (("Mean reward", 2), ("Difference from plain", 1)):
        drawn = page.get_by_role("img", name=chart).locator("path[fill-opacity='0.16']")
        drawn.nth(bands - 1).wait_for(state="attached")
        assert drawn.count() == bands
    accessible(page)
    page.unroute(path)


def test_it_is_reached_by_keyboard(page: Any) -> None:
    visit(page, "Adapters")
    page.locator("body").press("Tab")
    opener = page.get_by_role("button", name="Load an adapter")
    for _ in range(20):
        page.keyboard.press("Tab")
        if opener.evaluate("e => e === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    assert opener.evaluate("e => e === document.activeElement"), "the focus comes back"
