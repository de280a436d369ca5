"""Who computes what in the next step. Pure Python: no tensors, no clock but the caller's."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltaserve.kernels.segments import Mix
from deltaserve.server.engine.kv_cache import BlockManager, OutOfBlocks
from deltaserve.server.engine.sequence import Sequence

if TYPE_CHECKING:
    from deltaserve.server.engine.speculation import Speculator


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
        return len(self.decodes) + sum(c.count for c in self.chunks)


class Scheduler:
    """Continuous batching with chunked prefill.

    Each step first gives every decoding sequence its token, then spends what is left of
    `max_batch_tokens` on prompts in order of priority and arrival. A waiting sequence is passed
    over while its adapters are not resident. When blocks run out, the running sequence that comes
    last in that order is preempted: it gives back its blocks and waits to be computed anew.

    begin: called before a sequence is admitted, to lay out its tokens; False if it cannot be.
    first: a waiting request that is not to be overtaken by any that keeps adapters in memory which
    it does not use itself.
    """

    def __init__(self, blocks: BlockManager, max_batch_tokens: int, max_sequences: int) -> None:
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: list[Sequence] = []  # in order
        self.running: dict[Sequence, None] = {}
        self.preemptions = 0
        self.first: Sequence | None = None
        self.speculator: Speculator | None = None
        self.begin: Callable[[Sequence], bool] = lambda sequence: True

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or cancelled sequence and give back its blocks."""
        if sequence in self.running:
            del self.running[sequence]
        else:
            self._stop_waiting(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.hashes = [], []

    def schedule(self) -> Batch:
        batch = Batch()
        budget = self.max_batch_tokens
        ordered = sorted(self.running, key=_order)
        for sequence in ordered:
            if sequence in self.running and sequence.decoding and self._grow(sequence, 1, batch):
                batch.decodes.append(Scheduled(sequence, sequence.computed, 1))
                budget -= 1
        for sequence in ordered:
            if budget > 0 and sequence in self.running and not sequence.decoding:
                budget -= self._chunk(sequence, budget, batch)
        budget = self._admit(budget, batch)
        if self.speculator is not None:
            self.speculator.extend(batch, budget)
        batch.decodes.sort(key=_placement)
        batch.chunks.sort(key=_placement)
        return batch

    def advance(self, batch: Batch) -> None:
        """The step ran: its tokens are in the cache."""
        for part in batch.parts:
            if part.draft is not None:
                continue  # until it is accepted
            part.sequence.computed = max(part.sequence.computed, part.start + part.count)
        for sequence in dict.fromkeys(part.sequence for part in batch.parts):
            sequence.publish(self.blocks)

    def accept(self, sequence: Sequence) -> None:
        """Its drafts are verified: `tokens` ends with those that were right and one more. Blocks
        that were taken for the others are given back."""
        sequence.computed = len(sequence.tokens) - 1
        sequence.publish(self.blocks)
        held = -(-sequence.computed // self.blocks.block_size)
        self.blocks.release(sequence.blocks[held:])
        del sequence.blocks[held:]

    def _admit(self, budget: int, batch: Batch) -> int:
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_sequences:
                break
            if not sequence.resident or self._overtakes(sequence):
                continue
            if not self.begin(sequence):
                continue
            sequence.adopt(self.blocks)
            missing = -(-len(sequence.tokens) // self.blocks.block_size) - len(sequence.blocks)
            if missing > self.blocks.available:
                self.blocks.release(sequence.blocks)
                sequence.blocks, sequence.hashes, sequence.computed = [], [], 0
                break  # what comes after it must not overtake it for ever
            self._stop_waiting(sequence)
            self.running[sequence] = None
            budget -= self._chunk(sequence, budget, batch)
        return budget

    def _stop_waiting(self, sequence: Sequence) -> None:
        at = bisect.bisect_left(self.waiting, sequence.order, key=_order)
        if at < len(self.waiting) and self.waiting[at] is sequence:
            del self.waiting[at]

    def _overtakes(self, sequence: Sequence) -> bool:
        first = self.first
        if first is None or sequence.admitted or sequence.order <= first.order:
            return False
        return any(not a.pinned and a not in first.adapters for a in sequence.adapters)

    def _chunk(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Schedule the next part of a prompt; the number of tokens it takes."""
        fill = sequence.uncomputed_prefix
        count = min(budget, len(sequence.tokens) - sequence.computed - fill)
        if not self._grow(sequence, fill + count, batch):
            return 0
        if fill:
            batch.fills.append((sequence, sequence.computed, fill))
            sequence.computed += fill
        start, end = sequence.computed, sequence.computed + count
        while start < end:  # one chunk for each span: an adapter may become active inside
            stop = min(end, sequence.span_end(start))
            batch.chunks.append(Scheduled(sequence, start, stop - start))
            start = stop
        return count

    def _grow(self, sequence: Sequence, count: int, batch: Batch) -> bool:
        """Give the sequence blocks for `count` more tokens, preempting others if need be. False if
        it was itself the one to go."""
        need = -(-(sequence.computed + count) // self.blocks.block_size)
        while len(sequence.blocks) < need:
            try:
                sequence.blocks.append(self.blocks.take())
            except OutOfBlocks:
                victim = max(self.running, key=_order)
                self._preempt(victim, batch)
                if victim is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        self.preemptions += 1
        del self.running[sequence]
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.hashes, sequence.computed = [], [], 0
        batch.decodes = [p for p in batch.decodes if p.sequence is not sequence]
        batch.chunks = [p for p in batch.chunks if p.sequence is not sequence]
        batch.fills = [f for f in batch.fills if f[0] is not sequence]
        self.add(sequence)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _placement(part: Scheduled) -> tuple[object, ...]:
    """Equal mixes side by side, the base first; stable, so a batch is laid out the same way
    whatever was served before."""
    return (part.mix, part.sequence.arrival, part.start)
