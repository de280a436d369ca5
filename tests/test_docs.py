"""The documents say what the code does."""

import re
from pathlib import Path

from deltaserve.server.model.architectures import TESTED

DOCS = Path(__file__).parent.parent / "docs"


def test_every_architecture_is_listed() -> None:
    text = (DOCS / "architectures.md").read_text()
    assert re.findall(r"^- `(\w+)`$", text, re.MULTILINE) == sorted(TESTED)
    assert f"one of these {len(TESTED)}" in text


def test_links_lead_somewhere() -> None:
    root = DOCS.parent
    for page in [root / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
