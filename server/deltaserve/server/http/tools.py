"""Tools: which of them the model must call, and its answer as calls.

What a model writes to call a tool by its own choice has another form for every model, and is left
in the text. A call that the request demands is made by constraint: its text is the arguments.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from deltaserve.server.http.body import shown
from deltaserve.server.http.fields import Conversation
from deltaserve.server.http.refused import refuse

FREE = ("none", "auto")
ANY: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Demanded:
    """schema: of the answer. name: of the one tool; empty if the answer is a list of calls."""

    schema: dict[str, Any]
    name: str = ""

    @property
    def finish_reason(self) -> str:
        """In place of ``stop``: as with OpenAI, a call of a named tool is no news."""
        return "stop" if self.name else "tool_calls"

    def calls(self, text: str) -> list[dict[str, Any]] | None:
        """The answer's; None if it is not complete."""
        if self.name:
            return [_call(self.name, text)]
        try:
            found = json.loads(text)
        except ValueError:
            return None
        return [_call(c["name"], json.dumps(c["parameters"], ensure_ascii=False)) for c in found]


def template_tools(given: Conversation) -> list[dict[str, Any]] | None:
    """Those that the template offers to the model."""
    return None if given.tool_choice == "none" else given.tools


def demanded(given: Conversation, parallel: bool | None) -> Demanded | None:
    """What must be called. parallel: more than one call may be made. Raises InvalidRequest."""
    choice = given.tool_choice
    if choice is None or choice in FREE:
        return None
    tools = dict(_tool(f"tools.{i}", tool) for i, tool in enumerate(given.tools or ()))
    if choice == "required":
        if not tools:
            refuse("tools", "none beside tool_choice 'required'", "at least one")
        return Demanded(_list(tools, 1 if parallel is False else None))
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in tools:
        right = "'none', 'auto', 'required', or {'type': 'function', 'function': {'name': NAME}} "
        refuse("tool_choice", shown(choice), right + f"with one of {', '.join(tools) or 'tools'}")
    return Demanded(tools[name], name)


def _tool(field: str, tool: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name, and schema of the arguments."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        refuse(field, shown(tool), "{'type': 'function', 'function': …}")
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        refuse(f"{field}.function.name", shown(name), "text that is not empty")
    if not isinstance(schema, dict | None):
        refuse(f"{field}.function.parameters", shown(schema), "a JSON schema")
    return name, schema or ANY


def _list(tools: dict[str, dict[str, Any]], most: int | None) -> dict[str, Any]:
    """Of calls of any of the tools. Their definitions move to the root, where references look."""
    definitions: dict[str, Any] = {}
    calls = []
    for name, given in tools.items():
        schema = dict(given)
        for key, value in dict(schema.pop("$defs", None) or {}).items():
            if definitions.setdefault(key, value) != value:
                refuse("tools", f"two definitions of {key!r}", "one of each name in $defs")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    made: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if most is not None:
        made["maxItems"] = most
    return made | ({"$defs": definitions} if definitions else {})


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
