"""What the state keeps, as it is passed around."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

from deltaserve.adapters.options import LoadOptions

OK = "OK"
MAX_DETAIL = 1024
"""Characters of a text in the audit log."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter that was registered over the API. options: JSON. digest: of its content, empty
    until its first load is done. owner: who registered it. error: why it is not served, if so.
    tenant: whose it is. shared: others may use it."""

    name: str
    uri: str
    options: str
    digest: str = ""
    pinned: bool = False
    register_only: bool = False
    owner: str = ""
    error: str = ""
    tenant: str = ""
    shared: bool = True


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit log. verb: what was asked for, of the adapter `name`. outcome: ``OK``
    or the reason that the client was given, with its text as detail."""

    who: str
    verb: str
    name: str = ""
    outcome: str = OK
    detail: str = field(default="", kw_only=True)


def dump(options: LoadOptions) -> str:
    """JSON."""
    return json.dumps(asdict(options), sort_keys=True)


def parse(text: str) -> LoadOptions:
    """`dump` back. ValueError if it is not that."""
    given = json.loads(text)
    kinds = {f.name: f for f in fields(LoadOptions)}
    if not isinstance(given, dict) or set(given) != set(kinds):
        raise ValueError(f"options {text[:100]!r} are not {', '.join(sorted(kinds))}")
    task = given["task_id"]
    error = given["max_error"]
    if not (
        isinstance(given["allow_base_mismatch"], bool)
        and (task is None or type(task) is int)
        and type(error) in (int, float)
        and 0 <= error < 1
        and isinstance(given["parent"], str)
    ):
        raise ValueError(f"options {text[:100]!r} have values that no load could have given")
    return LoadOptions(**given)
