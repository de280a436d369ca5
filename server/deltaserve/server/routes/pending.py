"""Pending: what holds of routes, and is not yet in the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaserve.server.routes.route import Standing
from deltaserve.server.state.records import Entry

if TYPE_CHECKING:
    from deltaserve.server.routes.shelf import Shelf


class Pending:
    """Writes to the shelf, one change after the other, and remembers what is still to be written.
    shelf: None keeps nothing."""

    def __init__(self, shelf: Shelf | None) -> None:
        self._shelf = shelf
        self._found: dict[str, tuple[Standing, Entry]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def add(self, standing: Standing, entry: Entry) -> None:
        """It holds already."""
        if self._shelf is not None:
            self._found[standing.route.name] = standing, entry

    async def put(self, standing: Standing, entry: Entry) -> None:
        """In place of what is written, and of what was to be when this began. StateUnavailable."""
        name = standing.route.name
        before = self._found.get(name)
        if self._shelf is not None:
            await self._shelf.put(standing, entry)
        if before is not None and self._found.get(name) is before:
            del self._found[name]

    async def remove(self, name: str, entry: Entry) -> None:
        """It is there no more. StateUnavailable."""
        if self._shelf is not None:
            await self._shelf.remove(name, entry)
        self._found.pop(name, None)

    async def write(self) -> None:
        """What there is. StateUnavailable."""
        for standing, entry in list(self._found.values()):
            await self.put(standing, entry)
