"""Constraint: what a text must be, as a request says it. `matcher` follows it."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a text must be. kind: of `KINDS`; text: the schema, expression or grammar; none for
    ``json_object``. texts: those of ``choice``."""

    kind: str
    text: str = ""
    texts: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        """Its path in a request."""
        return f"constraint.{self.kind}"
