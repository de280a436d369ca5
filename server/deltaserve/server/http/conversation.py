"""Conversations as OpenAI writes them -> what a chat template gets."""

from __future__ import annotations

import json
from typing import Any

from deltaserve.server.http import tools
from deltaserve.server.http.body import shown
from deltaserve.server.http.fields import Conversation
from deltaserve.server.http.refused import refuse
from deltaserve.v1 import generation_pb2 as pb

ROLES = {"developer": "system"}
"""Roles that templates do not know, and what they are to them."""
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are text, and where it is."""


def to_message(given: Conversation) -> pb.ChatPrompt:
    """Raises InvalidRequest."""
    variables = dict(given.chat_template_kwargs or {})
    if given.documents is not None:
        variables.setdefault("documents", given.documents)
    if given.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", given.reasoning_effort)
    offered = tools.template_tools(given)
    made = pb.ChatPrompt(
        messages=[_turn(f"messages.{i}", turn) for i, turn in enumerate(given.messages or ())],
        tools_json=to_json("tools", offered) if offered else "",
        variables_json=to_json("chat_template_kwargs", variables) if variables else "",
    )
    if given.add_generation_prompt is not None:
        made.add_generation_prompt = given.add_generation_prompt
    return made


def to_json(field: str, value: object) -> str:
    """As text. Raises InvalidRequest for numbers that JSON does not have."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except ValueError:
        refuse(field, "a number beyond any double", "JSON with finite numbers")


def _turn(field: str, turn: Any) -> pb.ChatMessage:
    if not isinstance(turn, dict):
        refuse(field, shown(turn), "an object with role and content")
    role = _text(f"{field}.role", turn.get("role"))
    made = pb.ChatMessage(
        role=ROLES.get(role, role),
        content=_content(f"{field}.content", turn.get("content")),
        name=_text(f"{field}.name", turn.get("name")),
        tool_call_id=_text(f"{field}.tool_call_id", turn.get("tool_call_id")),
    )
    if calls := turn.get("tool_calls"):
        made.tool_calls_json = to_json("tool_calls", _calls(f"{field}.tool_calls", calls))
    for name in ("function_call", "audio"):
        if turn.get(name) is not None:
            refuse(f"{field}.{name}", shown(turn[name]), "left out; tools are told in tool_calls")
    return made


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str | None):
        refuse(field, shown(value), "text")
    return value or ""


def _content(field: str, value: Any) -> str:
    """Parts are joined by line ends."""
    if not isinstance(value, list):
        return _text(field, value)
    found = []
    for i, part in enumerate(value):
        where = f"{field}.{i}"
        if isinstance(part, str):
            found.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _TEXTS:
            refuse(f"{where}.type", shown(kind), "'text': this model reads text alone")
        found.append(_text(f"{where}.{_TEXTS[kind]}", part.get(_TEXTS[kind])))
    return "\n".join(found)


def _calls(field: str, calls: Any) -> list[Any]:
    """With their arguments as objects, as templates expect them; on the wire they are text."""
    if not isinstance(calls, list):
        refuse(field, shown(calls), "a list of objects")
    made = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            refuse(f"{field}.{i}.function", shown(function), "an object with name and arguments")
        given = function.get("arguments") or "{}"
        try:
            parsed = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            refuse(f"{field}.{i}.function.arguments", shown(given), "a JSON object, as text")
        made.append({**call, "function": {**function, "arguments": parsed}})
    return made
