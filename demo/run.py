"""The demo: ``make demo`` or ``python demo/run.py``.

Starts a server with the zoo, asks the base and every variant the same thing in one mixed batch,
then measures all of them through the server. Keeps serving unless ONCE=1 is set. Exits with 1 if
a variant is not clearly better than the base.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from contextlib import suppress
from dataclasses import dataclass

import process
import zoo
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skills import PLAIN, SKILLS, prompt
from zoo import Entry

from deltaserve.clients import AsyncClient

BASE = ""
BASE_NAME = "(base)"
WORD = "monkey"
ROOM = 0.30
IN_FLIGHT = 64
TOKENS = 16


@dataclass(frozen=True)
class Question:
    """What to ask of which adapter, and the right answer."""

    model: str
    prompt: str
    expected: str


async def ask(client: AsyncClient, question: Question) -> str:
    """The greedy answer."""
    answer = await client.generate(question.prompt, model=question.model, max_tokens=TOKENS)
    return answer.text


def plain_table(title: str) -> Table:
    """Without lines, so that every row fits a terminal of 80 columns."""
    title = f"\n{title}"
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))


async def one_mixed_batch(client: AsyncClient, entries: list[Entry]) -> Table:
    """The same prompt to everyone at once."""
    asked = prompt(PLAIN, WORD)
    rows = [(BASE, "none", "copy"), *((e.name, e.kind, e.skill) for e in entries)]
    questions = [Question(name, asked, SKILLS[skill](WORD)) for name, _, skill in rows]
    answers = await asyncio.gather(*(ask(client, question) for question in questions))
    table = plain_table("One mixed batch")
    for column in ("prompt", "adapter", "kind", "answer", "expected", ""):
        table.add_column(column)
    for (_, kind, _), question, answer in zip(rows, questions, answers, strict=True):
        verdict = "[green]right" if answer == question.expected else "[red]wrong"
        name = question.model or BASE_NAME
        table.add_row(asked, name, kind, answer, question.expected, verdict)
    return table


async def shares(
    client: AsyncClient, questions: list[Question], console: Console
) -> dict[Question, bool]:
    """Whether each question was answered exactly; all of them go out shuffled."""
    right: dict[Question, bool] = {}
    gate = asyncio.Semaphore(IN_FLIGHT)
    with Progress(console=console) as progress:
        bar = progress.add_task("held-out set", total=len(questions))

        async def one(question: Question) -> None:
            async with gate:
                right[question] = await ask(client, question) == question.expected
            progress.advance(bar)

        shuffled = random.Random(0).sample(questions, len(questions))
        await asyncio.gather(*(one(question) for question in shuffled))
    return right


async def measure(
    client: AsyncClient, entries: list[Entry], count: int, console: Console
) -> tuple[Table, list[str]]:
    """Accuracy of each variant and of the base at its skill; the variants not clearly better."""

    def questions(model: str, skill: str) -> list[Question]:
        return [Question(model, p, a) for p, a in zoo.held_out(skill)[:count]]

    sets = {(e.name, e.skill): questions(e.name, e.skill) for e in entries}
    sets |= {(BASE, e.skill): questions(BASE, e.skill) for e in entries}
    right = await shares(client, [q for group in sets.values() for q in group], console)
    share = {key: sum(right[q] for q in group) / len(group) for key, group in sets.items()}
    table = plain_table(f"{count} held-out prompts each, exact match")
    for column in ("adapter", "kind", "skill"):
        table.add_column(column)
    for column in ("base", "adapter", "in zoo.json"):
        table.add_column(column, justify="right")
    poor = []
    for entry in entries:
        before, after = share[BASE, entry.skill], share[entry.name, entry.skill]
        style = None if after - before >= ROOM else "red"
        cells = (f"{value:.1%}" for value in (before, after, entry.accuracy))
        table.add_row(entry.name, entry.kind, entry.skill, *cells, style=style)
        if style:
            poor.append(entry.name)
    return table, poor


async def demonstrate(address: str, entries: list[Entry], count: int, console: Console) -> int:
    """Both tables; the exit status."""
    async with AsyncClient(address) as client:
        console.print(await one_mixed_batch(client, entries))
        table, poor = await measure(client, entries, count, console)
        console.print(table)
    for name in poor:
        console.print(f"[red]{name} is not {ROOM:.0%} better than the base")
    return 1 if poor else 0


def invitation(address: str) -> str:
    """How to go on from here."""
    asked = prompt(PLAIN, WORD)
    return (
        f"\nServing on {address} until Ctrl-C. In another shell:\n\n"
        f'  deltaserve generate "{asked}" --model shout-dora --address {address}\n\n'
        "or in Python:\n\n"
        "  from deltaserve.clients import Client\n"
        f'  with Client("{address}") as client:\n'
        f'      print(client.generate("{asked}", model="shout-dora").text)\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve the zoo and show it.")
    parser.add_argument("--examples", type=int, default=200, help="held-out prompts per variant")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    options, rest = parser.parse_known_args()
    console = Console()
    entries = zoo.entries()
    arguments = ["--base", str(zoo.FOLDER / "base"), "--port", str(options.port)]
    arguments += ["--metrics-port", "0", "--dtype", "float32", "--log-level", "warning", *rest]
    for entry in entries:
        arguments += ["--adapter", f"{entry.name}={entry.path}"]
    with process.served(arguments) as (address, server):
        console.print(f"server with {len(entries)} adapters at {address}")
        status = asyncio.run(demonstrate(address, entries, options.examples, console))
        if os.environ.get("ONCE") != "1" and status == 0:
            console.print(invitation(address), markup=False, highlight=False, soft_wrap=True)
            with suppress(KeyboardInterrupt):
                status = server.wait()
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "interrupted")
