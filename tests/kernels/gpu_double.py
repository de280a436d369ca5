"""A device's streams whose copies and steps happen when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Marker:
    """Done once everything before it on its stream has happened."""

    happened: bool = False

    def done(self) -> bool:
        return self.happened


@dataclass(eq=False)
class Task:
    run: Callable[[], None]
    after: list[Task]
    happened: bool = False


class DelayedStreams:
    """Two streams. `launch` puts a step on the one, `copy` a copy on the other; `advance_steps` and
    `advance_copies` let the first few of each happen, in order, after what they wait for."""

    def __init__(self) -> None:
        self.steps: list[Task] = []
        self.copies: list[Task] = []
        self._all_steps: list[Task] = []
        self._after: list[Task] = []

    def pinned(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def launch(self, run: Callable[[], None]) -> None:
        self.steps.append(Task(run, []))
        self._all_steps.append(self.steps[-1])

    def after_steps(self) -> None:
        self._after = [task for task in self._all_steps if not task.happened]

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.copies.append(Task(lambda: target.copy_(source), self._after))

    def record(self) -> Marker:
        marker = Marker()

        def mark() -> None:
            marker.happened = True

        self.copies.append(Task(mark, []))
        return marker

    def advance_steps(self, count: int = 1 << 30) -> None:
        for task in self.steps[:count]:
            task.run()
            task.happened = True
        del self.steps[:count]

    def advance_copies(self, count: int = 1 << 30) -> int:
        """-> how many happened: those that wait for a step do not."""
        happened = 0
        while self.copies and happened < count:
            task = self.copies[0]
            if any(not other.happened for other in task.after):
                break
            task.run()
            task.happened = True
            del self.copies[0]
            happened += 1
        return happened
