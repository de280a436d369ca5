"""Conversations: the message -> what a chat template gets."""

from __future__ import annotations

import json
from typing import Any

from deltaserve.server.engine.chat import Chat
from deltaserve.server.service import convert
from deltaserve.v1 import generation_pb2 as pb

MAX_MESSAGES = 4096
MAX_JSON = 1 << 18
"""Characters of one JSON text."""


def conversation(chat: pb.ChatPrompt) -> tuple[Chat, int]:
    """The conversation, and how many characters it has."""
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        convert.refuse("chat.messages", f"{len(chat.messages)} messages", f"1 to {MAX_MESSAGES}")
    tools = _json("chat.tools_json", chat.tools_json, list)
    variables = _json("chat.variables_json", chat.variables_json, dict) or {}
    size = sum(len(turn.content) + len(turn.tool_calls_json) for turn in chat.messages)
    opened = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    made = Chat([_message(turn) for turn in chat.messages], opened, tools, variables)
    return made, size + len(chat.tools_json) + len(chat.variables_json)


def _message(turn: pb.ChatMessage) -> dict[str, Any]:
    if not turn.role:
        convert.refuse("chat.messages.role", "''", "a role, e.g. 'user'")
    made: dict[str, Any] = {"role": convert.label("chat.messages.role", turn.role)}
    made["content"] = turn.content and convert.prompt_text(turn.content, "chat.messages.content")
    for field in ("name", "tool_call_id"):
        if value := getattr(turn, field):
            made[field] = convert.label(f"chat.messages.{field}", value)
    if calls := _json("chat.messages.tool_calls_json", turn.tool_calls_json, list):
        made["tool_calls"] = calls
    return made


def _json(field: str, text: str, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """What the text says, none if it is empty: an object, or a list of objects."""
    if not text:
        return None
    if len(text) > MAX_JSON:
        convert.refuse(field, f"text of {len(text)} characters", f"at most {MAX_JSON} characters")
    right = "a JSON object" if kind is dict else "a JSON list of objects"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        convert.refuse(field, f"text that is no JSON ({error})", right)
    if not isinstance(found, kind) or (
        kind is list and not all(isinstance(item, dict) for item in found)
    ):
        convert.refuse(field, f"JSON of another kind, {text[:64]!r},", right)
    return found
