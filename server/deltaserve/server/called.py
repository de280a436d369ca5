"""What requests call adapters: a name, or ``name@digest-prefix``."""

from __future__ import annotations


def parse(called: str) -> tuple[str, str]:
    """-> the name, and the beginning of the digest, empty if any will do."""
    name, _, digest = called.partition("@")
    return name, digest
