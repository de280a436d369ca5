"""Fields: a quantization_config read field by field; what is not read is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deltaserve.server.model.errors import UnsupportedModel


class Fields:
    """where: what the mapping is called in messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._values = dict(values)
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; the default where it is left out or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def one_of(
        self, name: str, allowed: Collection[Any], default: Any = None, why: str = ""
    ) -> Any:
        """The field's value, which must be one of `allowed`."""
        value = self.get(name, default)
        if not any(type(value) is type(a) and value == a for a in allowed):
            known = " or ".join(repr(a) for a in allowed)
            raise self.refusal(name, f"must be {known}" + (f": {why}" if why else ""))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.one_of(name, (True, False), default))

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.get(name, default)
        if type(value) is not int:
            raise self.refusal(name, "must be a whole number")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings, none of them if it is left out."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.refusal(name, "must be a list of names")
        return tuple(value)

    def group_size(self, name: str = "group_size", default: int | None = None) -> int:
        """Neighbouring inputs that share a scale; -1 for all of them."""
        size = self.whole(name, default)
        if size != -1 and (size <= 0 or size % 8):
            raise self.refusal(name, "must be -1 or a positive multiple of 8")
        return size

    def refusal(self, name: str, reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.where}.{name} is {self._values.get(name)!r}; it {reason}")

    def finish(self, harmless: Collection[str]) -> None:
        """Refuses a field that was not read, unless it is one of `harmless`: those that say how
        the weights were found or how another program is to run them, not what they are."""
        for name, value in self._values.items():
            if name not in self._read and name not in harmless and value is not None:
                known = ", ".join(sorted(self._read))
                raise self.refusal(name, f"is not known here; known: {known}")
