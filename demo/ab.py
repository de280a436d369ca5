"""An A/B test from end to end: ``python demo/ab.py``.

Starts a server with two adapters for one skill, the one that is in use and a candidate, and a
route over both. Simulated users ask it; the reward of an answer is whether it is exactly right. The
report is looked at again and again, and when its interval for the difference excludes 0, the better
adapter gets all users. Exits with 1 if nothing was found, or if it is not what zoo.json says.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections.abc import Iterator

import process
import zoo
from rich.console import Console
from skills import examples

from deltaserve.clients import AsyncClient
from deltaserve.clients.report_types import ArmReport

SKILL = "caesar"
CONTROL, CANDIDATE = "current", "candidate"
ADAPTERS = {CONTROL: "caesar-lora-weak", CANDIDATE: "caesar-lora"}
WAVE = 40
TUNED_FOR = 200
TOKENS = 16
ROW = "{:>9}  {:>9}  {:>9}  {}"


async def put(client: AsyncClient, weights: dict[str, float]) -> None:
    """The route, with these weights."""
    arms = [
        {"name": arm, "model": adapter, "weight": weights[arm]} for arm, adapter in ADAPTERS.items()
    ]
    await client.put_route(SKILL, arms, control=CONTROL)


async def one_user(client: AsyncClient, name: str, questions: list[tuple[str, str]]) -> None:
    """Asks, and says of each answer whether it was right. Who answers it never hears."""
    for question, expected in questions:
        answer = await client.generate(question, model=SKILL, user=name, max_tokens=TOKENS)
        await client.record_feedback(answer.request_id, float(answer.text == expected))


async def look(client: AsyncClient) -> dict[str, ArmReport]:
    """The report as it stands, by arm."""
    report = await client.get_report(SKILL, tuned_for=TUNED_FOR)
    if report.sample_ratio.mismatch:
        raise RuntimeError("the arms do not have the users that their weights say")
    return {arm.arm: arm for arm in report.arms}


def shown(arms: dict[str, ArmReport]) -> str:
    """One row: users, share of right answers, and the difference with its interval."""
    counts = "+".join(str(arms[arm].rewarded_users) for arm in ADAPTERS)
    means = [f"{arms[arm].reward.value:.2f}" for arm in ADAPTERS]
    difference = arms[CANDIDATE].difference
    within = f"from {difference.low:+.2f} to {difference.high:+.2f}"
    known = within if math.isfinite(difference.low) else "too few users to say more"
    return ROW.format(counts, *means, f"{difference.value:+.2f} {known}")


def found(arms: dict[str, ArmReport]) -> str:
    """The better arm, if the report can tell."""
    difference = arms[CANDIDATE].difference
    if difference.low > 0:
        return CANDIDATE
    return CONTROL if difference.high < 0 else ""


def users(count: int, questions: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each with up to so many questions that nobody else asks, and no training saw."""
    draw = random.Random(0)
    asked = iter(examples(SKILL, count * questions))
    for i in range(count):
        yield f"user-{i}", [next(asked) for _ in range(draw.randint(1, questions))]


async def experiment(address: str, most: int, questions: int, console: Console) -> int:
    """The exit status. most: users."""
    began = time.monotonic()
    coming = users(most, questions)
    async with AsyncClient(address) as client:
        await put(client, {CONTROL: 1.0, CANDIDATE: 1.0})
        console.print(ROW.format("users", *ADAPTERS, "difference"))
        better = ""
        while not better and (wave := [user for _, user in zip(range(WAVE), coming, strict=False)]):
            await asyncio.gather(*(one_user(client, *user) for user in wave))
            arms = await look(client)
            better = found(arms)
            console.print(shown(arms))
        if not better:
            console.print(f"[red]{most} users were too few to tell")
            return 1
        seconds = time.monotonic() - began
        console.print(f"{better} ({ADAPTERS[better]}) is better; {seconds:.0f} s")
        await put(client, {arm: float(arm == better) for arm in ADAPTERS})
        after = await client.generate("task: word =", model=SKILL, user="user-0", max_tokens=TOKENS)
        console.print(f"from now on every user gets {after.served_by.arm}")
    accuracy = {entry.name: entry.accuracy for entry in zoo.entries()}
    truth = max(ADAPTERS, key=lambda arm: accuracy[ADAPTERS[arm]])
    return 0 if better == truth == after.served_by.arm else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Find the better of two adapters.")
    parser.add_argument("--users", type=int, default=600, help="the most that are asked")
    parser.add_argument("--questions", type=int, default=3, help="the most that one asks")
    options = parser.parse_args()
    serve = ["--base", str(zoo.FOLDER / "base"), "--port", "0", "--http-port", "off"]
    serve += ["--dtype", "float32", "--log-level", "warning"]
    for name in ADAPTERS.values():
        serve += ["--adapter", f"{name}={zoo.FOLDER / name}"]
    with process.served(serve) as (address, _):
        console = Console(highlight=False)
        return asyncio.run(experiment(address, options.users, options.questions, console))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "interrupted")
