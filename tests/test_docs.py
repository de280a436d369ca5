"""The documents say what the code does."""

import re
import runpy
from pathlib import Path
from typing import Any

import typer.main

from deltaserve.server.cli import app
from deltaserve.server.model.architectures import TESTED

DOCS = Path(__file__).parent.parent / "docs"


def test_every_architecture_is_listed() -> None:
    text = (DOCS / "architectures.md").read_text()
    assert re.findall(r"^- `(\w+)`$", text, re.MULTILINE) == sorted(TESTED)
    assert f"one of these {len(TESTED)}" in text


PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^):]+)\)", page.read_text())


def anchors(page: Path) -> set[str]:
    """As GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index() -> None:
    listed = {link.partition("#")[0] for link in links(DOCS / "README.md")}
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= listed, "add it to docs/README.md"
    assert "docs/README.md" in links(DOCS.parent / "README.md")


def test_the_flags_that_operators_are_told_of_exist() -> None:
    def flags(command: Any) -> set[str]:
        if hasattr(command, "commands"):
            return set().union(*map(flags, command.commands.values()))
        return {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}

    known = flags(typer.main.get_command(app)) | {"--help"}
    told = set(re.findall(r"--[a-z][a-z-]*", (DOCS / "operating.md").read_text()))
    assert len(told) > 20 and told <= known


def test_the_api_is_written_down() -> None:
    page = runpy.run_path(str(DOCS / "api_reference.py"))["page"]()
    assert (DOCS / "api.md").read_text() == page, "run make stubs"


def test_the_fields_of_peft_configs_are_written_down() -> None:
    page = runpy.run_path(str(DOCS / "peft_fields.py"))["page"]()
    assert (DOCS / "peft-fields.md").read_text() == page, "run python docs/peft_fields.py"
