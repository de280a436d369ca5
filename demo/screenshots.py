"""The pictures of docs/console.md: serves the zoo, keeps it busy, has an experiment run, and takes
them in the chromium that is installed."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import process
import zoo
from playwright.async_api import FloatRect, Page, async_playwright
from rich.progress import Progress
from skills import PLAIN, SKILLS, prompt
from zoo import Entry

from deltaserve.clients import AsyncClient

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "console"
ROUTE = "cipher"
ARMS = {"weak": "caesar-lora-weak", "strong": "caesar-lora"}
CONTENT = {True: 0.9, False: 0.1}
"""Share of users who are content with a right answer, and with a wrong one."""
AT_ONCE = 8
MODELS = ("caesar-lora", "shout-dora", "sort-ia3", "rotate-half")
WIDTH = 960
LOOK_SECONDS = 3.0
"""For a page to have asked for what it shows, and drawn it."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


async def experiment(client: AsyncClient, count: int, seconds: float) -> None:
    """So many users ask for ciphers, in about so many seconds."""
    await client.put_route(
        ROUTE,
        [{"name": name, "model": model} for name, model in ARMS.items()],
        guardrails=[{"metric": "error", "tolerated": 0.05}],
    )
    questions = zoo.held_out("caesar")
    users: Iterator[int] = iter(range(count))
    with Progress() as progress:
        bar = progress.add_task("users", total=count)

        async def some() -> None:
            for i in users:
                asked, right = questions[i % len(questions)]
                answer = await client.generate(asked, ROUTE, max_tokens=12, user=f"u{i}")
                content = random.random() < CONTENT[answer.text == right]
                await client.record_feedback(answer.request_id, float(content))
                progress.advance(bar)
                await asyncio.sleep(seconds * AT_ONCE / count)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def others(client: AsyncClient) -> None:
    """Waves of requests for several adapters, until it is cancelled."""
    words = [word for word, _ in zoo.held_out("copy")]
    while True:
        crowd = [random.choice(MODELS) for _ in range(random.randint(1, 24))]
        asked = [client.generate(random.choice(words), m, max_tokens=24) for m in crowd]
        await asyncio.gather(*asked)
        await asyncio.sleep(2 * random.random())


async def visit(page: Page, name: str) -> None:
    await page.get_by_role("link", name=name, exact=True).click()
    await asyncio.sleep(LOOK_SECONDS)


async def take(page: Page, name: str, height: int | None = None) -> None:
    """height: in pixels, from the top; all of the page without."""
    path = FOLDER / f"{name}.png"
    if height is None:
        await page.screenshot(path=path, full_page=True)
        return
    clip = FloatRect(x=0, y=0, width=WIDTH, height=height)
    await page.screenshot(path=path, full_page=True, clip=clip)


async def pictures(address: str, console: str, users: int, seconds: float) -> None:
    async with AsyncClient(address) as client, async_playwright() as p:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = await p.chromium.launch(
            executable_path=shutil.which("chromium") or "chromium", args=sandbox
        )
        page = await browser.new_page(viewport={"width": WIDTH, "height": 560})
        await page.goto(console)
        waves = asyncio.create_task(others(client))
        await experiment(client, users, seconds)
        await take(page, "overview", 690)
        await client.pin_adapter("caesar-lora")
        await visit(page, "Adapters")
        await take(page, "adapters")
        waves.cancel()
        await visit(page, "Playground")
        await page.get_by_label("Prompt").fill(prompt(PLAIN, "monkey"))
        await page.get_by_role("button", name="Add a column").click()
        names = page.get_by_label("adapter, route or base")
        await names.nth(1).fill("shout-dora")
        await names.nth(2).fill("caesar-lora")
        column = page.locator(".column").nth(2)
        await column.get_by_role("button", name="+ compose").click()
        await names.nth(3).fill("sort-ia3")
        await column.get_by_label("strength").nth(1).fill("0.5")
        await page.get_by_role("button", name="Run").click()
        await page.locator("[data-state=finished]").nth(2).wait_for()
        answers = await page.locator(".answer").all_inner_texts()
        assert answers[:2] == ["monkey", SKILLS["shout"]("monkey")], answers
        await take(page, "playground")
        await visit(page, "Routes")
        await take(page, "routes")
        await browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="how long it is kept busy")
    parser.add_argument("--users", type=int, default=900, help="of the experiment")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    os.chdir(ROOT)
    entries: list[Entry] = zoo.entries()
    port = free_port()
    arguments = ["--base", "demo/zoo/base", "--port", "0", "--http-port", str(port)]
    arguments += ["--dtype", "float32", "--log-level", "warning", "--memory", "64MiB"]
    for entry in entries:
        arguments += ["--adapter", f"{entry.name}={entry.path.relative_to(ROOT)}"]
    with process.served(arguments) as (address, _):
        console = f"http://127.0.0.1:{port}/console/"
        asyncio.run(pictures(address, console, options.users, options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
