"""Users: what each user met with, a row of numbers each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from enum import IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt


class Met(IntFlag):
    """What happened to a user at least once. The names of those that guardrails count are the
    metrics'."""

    ERROR = 1
    REFUSAL = 2
    EMPTY = 4
    SLOW = 8
    SLOW_FIRST_TOKEN = 16
    LONG = 32
    RANDOMIZED = 64  # assigned while more than one arm had a weight
    CROSSED = 128  # answered by another arm than the one that the user counts for
    SHADOW = 256


ROW = np.dtype(
    [
        ("user", np.int64),
        ("arm", np.int32),  # index into the book's arms
        ("met", np.int32),
        ("first", np.float64),  # when it was first exposed to the arm
        ("requests", np.int64),
        ("seconds", np.float64),  # the largest, likewise the next two
        ("first_token", np.float64),
        ("tokens", np.int64),
        ("sum", np.float64),  # of rewards, and how many, and how many below 0
        ("n", np.int64),
        ("negative", np.int64),
        ("before_sum", np.float64),  # of rewards from before it was assigned at random
        ("before_n", np.int64),
    ]
)

Rows = npt.NDArray[np.void]

PAGE = 16_384
"""Users that are gone over at one go: about 2 ms of the event loop."""


class Users:
    """96 bytes a user, and about as much for finding it. A row keeps its place: that of a user who
    was erased is of arm -1, which there is not, and goes to the next one who comes."""

    def __init__(self) -> None:
        self._rows: Rows = np.zeros(64, ROW)
        self._places = 0
        self._free: list[int] = []
        self.index: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    @property
    def rows(self) -> Rows:
        """`ROW`s, those of erased users among them. A view: changes with every change."""
        return self._rows[: self._places]

    async def pages(self) -> AsyncIterator[Rows]:
        """The rows that there are now, some at a time; others have their turn in between. Each row
        comes once, as it is then."""
        for start in range(0, self._places, PAGE):
            if start:
                await asyncio.sleep(0)
            yield self.rows[start : start + PAGE]

    def row(self, i: int) -> Any:
        """One of them, to be read and written by name."""
        return self._rows[i]

    def add(self, user: int) -> int:
        """-> its index, of a row of zeros."""
        if self._free:
            i = self._free.pop()
            self._rows[i] = np.zeros((), ROW)
        else:
            i, self._places = self._places, self._places + 1
        if i == len(self._rows):
            grown = np.zeros(i + i // 2, ROW)
            grown[:i] = self._rows
            self._rows = grown
        self.index[user] = i
        self._rows[i]["user"] = user
        return i

    def erase(self, user: int) -> int:
        """-> the index that it had, -1 if it is not here."""
        i = self.index.pop(user, -1)
        if i >= 0:
            self._rows[i] = np.zeros((), ROW)
            self._rows[i]["arm"] = -1
            self._free.append(i)
        return i
