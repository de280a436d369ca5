"""The documents say what the code does."""

import re
import runpy
from pathlib import Path

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


def test_the_api_is_written_down() -> None:
    page = runpy.run_path(str(DOCS / "api_reference.py"))["page"]()
    assert (DOCS / "api.md").read_text() == page, "run make stubs"


def test_the_fields_of_peft_configs_are_written_down() -> None:
    page = runpy.run_path(str(DOCS / "peft_fields.py"))["page"]()
    assert (DOCS / "peft-fields.md").read_text() == page, "run python docs/peft_fields.py"
