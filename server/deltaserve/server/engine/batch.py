"""Batch: what one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltaserve.kernels.segments import Mix
from deltaserve.server.engine.sequence import Sequence


@dataclass(slots=True)
class Scheduled:
    """One sequence's part of a step: its tokens [start, start + count) are computed; with
    `sample`, they reach the newest token and the next one is chosen. draft: the part is this one
    token, which the sequence does not have yet: it is verified by what is chosen before it."""

    sequence: Sequence
    start: int
    count: int
    draft: int | None = None

    @property
    def mix(self) -> Mix:
        """The adapters that act on these tokens; the same on all of them."""
        return self.sequence.span_at(self.start).mix

    @property
    def tokens(self) -> list[int]:
        if self.draft is not None:
            return [self.draft]
        return self.sequence.tokens[self.start : self.start + self.count]

    @property
    def sample(self) -> bool:
        return self.start + self.count >= len(self.sequence.tokens)


@dataclass(slots=True)
class Batch:
    """One step. decodes: single tokens, ordered by adapters, a sequence's drafts behind its own;
    chunks: parts of prompts, likewise, a sequence having one for each of its spans that the step
    computes.
    fills: (sequence, start, count): virtual tokens whose given keys and values are to be written.
    """

    decodes: list[Scheduled] = field(default_factory=list)
    chunks: list[Scheduled] = field(default_factory=list)
    fills: list[tuple[Sequence, int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def parts(self) -> list[Scheduled]:
        return [*self.decodes, *self.chunks]

    @property
    def tokens(self) -> int:
        return len(self.decodes) + self.prompt_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(c.count for c in self.chunks)


def placement(part: Scheduled) -> tuple[object, ...]:
    """Equal mixes side by side, the base first; stable, so a batch is laid out the same way
    whatever was served before."""
    return (part.mix, part.sequence.arrival, part.start)
