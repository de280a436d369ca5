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
    over while its adapters are not resident, or the prompt that it shares with a sibling is not
    computed. When blocks run out, the running sequence that comes last in that order is preempted:
    it gives back its blocks and waits to be computed anew. Of a combination the first member waits
    and runs for all: they are admitted and preempted together.

    begin: called before a sequence is admitted, to lay out its tokens; False if it cannot be.
    withdraw: undoes that for a combination which finds no room for all that it may need.
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
        self.withdraw: Callable[[Sequence], None] = lambda sequence: None

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or cancelled sequence and give back its blocks."""
        if sequence in self.running:
            del self.running[sequence]
        else:
            self._stop_waiting(sequence)
        sequence.ended = True
        self._give_back(sequence)

    def schedule(self) -> Batch:
        batch = Batch()
        budget = self.max_batch_tokens
        self.blocks.keep_claim(max(map(self._most, self.running), default=0))
        ordered = sorted(self.running, key=_order)
        for sequence in ordered:
            if sequence in self.running and sequence.decoding:
                budget -= self._decode(sequence, batch)
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
        rows = sum(len(sequence.members) for sequence in self.running)
        crowded = False  # only what holds adapters already may still go before who waits for room
        for sequence in list(self.waiting):
            members = sequence.members
            if budget <= 0 or rows + len(members) > self.max_sequences:
                break
            if not sequence.resident or sequence.early or self._overtakes(sequence):
                continue
            if crowded and not sequence.admitted:
                continue
            if not self.begin(sequence):
                continue
            if not self.blocks.claim(self._most(sequence)):
                self.withdraw(sequence)
                crowded = True
                continue
            for member in members:
                member.adopt(self.blocks)
            size = self.blocks.block_size
            missing = sum(-(-len(m.tokens) // size) - len(m.blocks) for m in members)
            if missing > self.blocks.available:
                self._give_back(sequence)
                break  # what comes after it must not overtake it for ever
            self._stop_waiting(sequence)
            self.running[sequence] = None
            rows += len(members)
            budget -= self._chunk(sequence, budget, batch)
        return budget

    def _most(self, sequence: Sequence) -> int:
        """Blocks that it may need."""
        return sum(-(-m.most // self.blocks.block_size) for m in sequence.members)

    def _stop_waiting(self, sequence: Sequence) -> None:
        at = bisect.bisect_left(self.waiting, sequence.order, key=_order)
        if at < len(self.waiting) and self.waiting[at] is sequence:
            del self.waiting[at]

    def _overtakes(self, sequence: Sequence) -> bool:
        first = self.first
        if first is None or sequence.admitted or sequence.order <= first.order:
            return False
        return any(not a.pinned and a not in first.held for a in sequence.held)

    def _decode(self, sequence: Sequence, batch: Batch) -> int:
        """Schedule the newest token, of each member; the number of tokens that it takes."""
        for member in sequence.members:
            if not self._grow(member, member.uncomputed_prefix + 1, batch):
                return 0
        for member in sequence.members:
            self._fill(member, batch)
            batch.decodes.append(Scheduled(member, member.computed, 1))
        return len(sequence.members)

    def _chunk(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Schedule the next part of a prompt; the number of tokens it takes. Members compute theirs
        up to their tails, then these in lockstep, so that the rows that belong together are in one
        step; all at once where that fits."""
        members = sequence.members
        whole = sum(m.pending for m in members) <= budget
        taken = 0
        for member in members:
            left = member.pending if whole else member.pending - member.tail
            count = min(budget - taken, left)
            if count > 0:
                if not self._compute(member, count, batch):
                    return 0
                taken += count
        if taken:
            return taken
        count = min(sequence.pending, max(1, budget // len(members)))
        computed = all(self._compute(member, count, batch) for member in members)
        return count * len(members) if computed else 0

    def _compute(self, sequence: Sequence, count: int, batch: Batch) -> bool:
        """Schedule the next `count` tokens of one sequence; False if it was the one to go."""
        if not self._grow(sequence, sequence.uncomputed_prefix + count, batch):
            return False
        self._fill(sequence, batch)
        start, end = sequence.computed, sequence.computed + count
        while start < end:  # one chunk for each span: an adapter may become active inside
            stop = min(end, sequence.span_end(start))
            batch.chunks.append(Scheduled(sequence, start, stop - start))
            start = stop
        return True

    def _fill(self, sequence: Sequence, batch: Batch) -> None:
        """Schedule the given keys and values that are not written yet."""
        if fill := sequence.uncomputed_prefix:
            batch.fills.append((sequence, sequence.computed, fill))
            sequence.computed += fill

    def _grow(self, sequence: Sequence, count: int, batch: Batch) -> bool:
        """Give the sequence blocks for `count` more tokens, preempting others if need be. False if
        its own request was the one to go."""
        need = -(-(sequence.computed + count) // self.blocks.block_size)
        while len(sequence.blocks) < need:
            try:
                sequence.blocks.append(self.blocks.take())
            except OutOfBlocks:
                victim = max(self.running, key=_order)
                self._preempt(victim, batch)
                if victim is sequence.lead:
                    return False
        return True

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        self.preemptions += 1
        del self.running[sequence]
        self._give_back(sequence)
        batch.decodes = [p for p in batch.decodes if p.sequence.lead is not sequence]
        batch.chunks = [p for p in batch.chunks if p.sequence.lead is not sequence]
        batch.fills = [f for f in batch.fills if f[0].lead is not sequence]
        self.add(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        for member in sequence.members:
            self.blocks.release(member.blocks)
            member.blocks, member.hashes, member.computed = [], [], 0


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _placement(part: Scheduled) -> tuple[object, ...]:
    """Equal mixes side by side, the base first; stable, so a batch is laid out the same way
    whatever was served before."""
    return (part.mix, part.sequence.arrival, part.start)
