"""What the answer must be: response_format, guided_* and structured_outputs -> a constraint."""

from __future__ import annotations

from typing import Any

from deltaserve.server.http.body import shown
from deltaserve.server.http.conversation import to_json
from deltaserve.server.http.fields import Sampled
from deltaserve.server.http.refused import refuse
from deltaserve.v1 import generation_pb2 as pb

_GUIDED = ("json", "regex", "choice", "grammar")
_OUTPUTS = (*_GUIDED, "json_object")
_IGNORED = (
    "backend",
    "disable_fallback",
    "disable_any_whitespace",
    "disable_additional_properties",
)
"""Ways in which other servers keep to a constraint."""


def to_message(given: Sampled) -> tuple[pb.Constraint | None, str]:
    """The constraint, and the field that it came from. Raises InvalidRequest."""
    found: list[tuple[str, str, Any]] = []
    if given.response_format is not None:
        found += _format(given.response_format)
    for kind in _GUIDED:
        value = getattr(given, f"guided_{kind}")
        if value is not None:
            found.append((f"guided_{kind}", kind, value))
    for name, value in (given.structured_outputs or {}).items():
        field = f"structured_outputs.{name}"
        if value is None or name in _IGNORED:
            continue
        if name not in _OUTPUTS:
            refuse(field, shown(value), f"left out; there are {', '.join(_OUTPUTS)}")
        found.append((field, name, value))
    if len(found) > 1:
        names = " and ".join(field for field, _, _ in found)
        refuse(found[1][0], f"a second constraint ({names})", "left out, or the other one")
    if not found:
        return None, ""
    [(field, kind, value)] = found
    return _constraint(field, kind, value), field


def _format(given: dict[str, Any]) -> list[tuple[str, str, Any]]:
    kind = given.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", "json_object", True)]
    if kind != "json_schema":
        right = "'text', 'json_object' or 'json_schema'"
        refuse("response_format.type", shown(kind), right)
    inner = given.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    field = "response_format.json_schema.schema"
    if not isinstance(schema, dict | bool):
        refuse(field, shown(schema), "a JSON schema")
    return [(field, "json", schema)]


def _constraint(field: str, kind: str, value: Any) -> pb.Constraint:
    if kind == "json_object":
        if value is not True:
            refuse(field, shown(value), "true, or left out")
        return pb.Constraint(json_object=True)
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            refuse(field, shown(value), "a list of texts")
        return pb.Constraint(choice=pb.StringList(values=value))
    if kind == "json":
        text = value if isinstance(value, str) else to_json(field, value)
        return pb.Constraint(json_schema=text)
    if not isinstance(value, str):
        refuse(field, shown(value), "text")
    if kind == "regex":
        return pb.Constraint(regex=value)
    return pb.Constraint(grammar=value)
