"""Chat: a conversation, as a request gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. messages: {"role", "content"} each, and what else the template reads. tools:
    as the template wants them; variables: of the template, none of `text.RESERVED`."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
