"""Who computes what in the next step. Pure Python: no tensors, no clock but the caller's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from deltaserve.server.engine.batch import Batch, Scheduled, placement
from deltaserve.server.engine.cost import CostModel, StepLoad
from deltaserve.server.engine.fair_queue import FairQueue
from deltaserve.server.engine.kv_cache import BlockManager, OutOfBlocks
from deltaserve.server.engine.order import Order
from deltaserve.server.engine.room import claim, give_way, prompt_shares
from deltaserve.server.engine.sequence import Sequence

if TYPE_CHECKING:
    from deltaserve.server.engine.speculation import Speculator


class Scheduler:
    """Continuous batching with chunked prefill.

    Each step first gives every decoding sequence its token, then spends what is left of
    `max_batch_tokens` on prompts: of the running sequences in order of their places, then of
    waiting ones in order of level, virtual time and arrival (`FairQueue`). A waiting sequence is
    passed over while its adapters are not resident, or the prompt that it shares with a sibling is
    not computed. `Room` says who gives way when blocks or
    sequences run out.

    Nobody waits for ever. The running sequence whose place is first always advances: it is never
    preempted, and its prompt gets a token even in a step that is full. Places are never changed,
    so each sequence is the first in the end. One that was preempted comes back before new ones of
    its level, and takes nothing from others when it does. One admission in `FAIR_TURN` goes to who
    has waited `PATIENCE`, in order of virtual time whatever their priorities, and the level of who
    enters so is above all others from then on.

    cost: charged to the flows, and fitted to the steps. inter_token_target: most seconds that a
    step should take while somebody decodes; prompts are cut shorter for it.
    begin: called before a sequence is admitted, to lay out its tokens; False if it cannot be.
    withdraw: undoes that for a combination which finds no room for all that it may need.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_batch_tokens: int,
        max_sequences: int,
        *,
        cost: CostModel | None = None,
        inter_token_target: float | None = None,
    ) -> None:
        self.blocks = blocks
        blocks.moved = self._renumber
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.queue = FairQueue()
        self.order = Order(self.queue)
        self.cost = cost or CostModel(0)
        self.inter_token_target = inter_token_target
        self.running: dict[Sequence, None] = {}
        self.preemptions = 0
        self.speculator: Speculator | None = None
        self.begin: Callable[[Sequence], bool] = lambda sequence: True
        self.withdraw: Callable[[Sequence], None] = lambda sequence: None
        self._tickets = itertools.count()
        self._lag = 0.0

    @property
    def waiting(self) -> list[Sequence]:
        """In no order; from any thread."""
        return self.queue.snapshot()

    @property
    def virtual_lag(self) -> float:
        """As `FairQueue.lag` at the last step."""
        return self._lag

    def check_integrity(self) -> None:
        """Raise if a block or a request is lost or counted twice."""
        self.blocks.check_integrity()
        self.queue.check_integrity()
        held = Counter(b for s in self.running for m in s.members for b in m.blocks)
        if any(self.blocks.references(b) != n for b, n in held.items()):
            raise AssertionError("a block is held by more or fewer than its references say")
        if self.blocks.used != len(held):
            raise AssertionError("a block is used by nobody that runs")
        if any(s in self.queue for s in self.running):
            raise AssertionError("a request runs and waits")

    def add(self, sequence: Sequence) -> None:
        self.queue.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or cancelled sequence and give back its blocks."""
        self.running.pop(sequence, None)
        self.queue.remove(sequence)
        sequence.ended = True
        self._give_back(sequence)

    def schedule(self, now: float = 0.0) -> Batch:
        """The next step. now: seconds, as in `Sequence.submitted`."""
        batch = Batch()
        self._lag = self.queue.lag()
        self.blocks.keep_claim(max(map(self._most, self.running), default=0))
        ordered = sorted(self.running, key=lambda s: s.place)
        for sequence in ordered:
            if sequence in self.running and sequence.decoding:
                self._decode(sequence, batch)
        budget = self._prompt_budget(batch)
        self.order.begin_step(now)
        prompts = [s for s in ordered if s in self.running and not s.decoding]
        head = self._head() if prompts else None
        for sequence, share in prompt_shares(prompts, head, budget, batch):
            if sequence in self.running:
                least = 1 if sequence is ordered[0] else 0
                self._chunk(sequence, max(share, least), batch)
        self._admit(budget, batch)
        if self.speculator is not None:
            self.speculator.extend(batch, budget - batch.prompt_tokens)
        batch.decodes.sort(key=placement)
        batch.chunks.sort(key=placement)
        return batch

    def charge(self, batch: Batch) -> StepLoad:
        """The batch is about to run: charge the flows for it."""
        load = StepLoad()
        fresh: dict[Sequence, int] = {}
        for part in batch.parts:
            s, end = part.sequence, part.start + part.count
            load.add(s, part.count)
            if part.draft is not None:
                fresh[s] = fresh.get(s, 0) + 1  # whether it is accepted or not
            elif end > s.reached:  # not computed again after a preemption
                fresh[s] = fresh.get(s, 0) + max(0, end - max(s.charged, part.start))
                s.reached, s.charged = end, max(s.charged, end)
        for sequence, seconds in self.cost.charges(load, fresh).items():
            self.queue.charge(sequence.lead, seconds)
        return load

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

    def _prompt_budget(self, batch: Batch) -> int:
        """Prompt tokens that the step takes beside its decodes; some in any case."""
        budget = self.max_batch_tokens - len(batch.decodes)
        if self.inter_token_target is None or not batch.decodes or budget <= 0:
            return budget
        load = StepLoad()
        for sequence in self.running:
            for member in sequence.members:
                load.add(member, 0)
        within = self.cost.tokens_within(self.inter_token_target, load.adapter_bytes)
        return min(budget, max(within - len(batch.decodes), self.blocks.block_size))

    def _head(self) -> Sequence | None:
        """Whose turn to be admitted is next, if there is room for it or can be made."""
        head = self.order.next()
        if head is None or head.prompt_tokens > self.blocks.available * self.blocks.block_size:
            return None
        rows = len(head.members)
        places = self._rows() + rows - self.max_sequences
        leaving = self._claim(head, self.running, places, rows, _rows, _rows)
        return head if leaving is not None else None

    def _admit(self, budget: int, batch: Batch) -> None:
        """budget: prompt tokens of the step, of which those that run have taken their parts. Who is
        admitted leaves the next one its own."""
        order = self.order
        while batch.prompt_tokens < budget:
            new = order.next()
            overdue = order.overdue(new)
            sequence = overdue or order.returning(new) or new
            if sequence is None:
                break
            crowded, entered = order.crowded, self._enter(sequence, batch)
            if not entered and new is not None and sequence is not new:
                sequence, entered = new, self._enter(new, batch)  # it may drive others out
            if order.crowded and not crowded:
                continue
            if entered:
                order.entered(sequence, by_age=sequence is overdue)
                ((_, share),) = prompt_shares([sequence], self._head(), budget, batch)
                first = min(self.running, key=lambda s: s.place)  # always advances
                self._chunk(sequence, max(share, 1 if sequence is first else 0), batch)
            elif sequence in self.queue:
                break  # what comes after it must not overtake it for ever

    def _enter(self, sequence: Sequence, batch: Batch) -> bool:
        """Admit it, if there is room or it has a right to what others hold. One that cannot begin
        is taken out of the queue."""
        members = sequence.members
        places = self._rows() + len(members) - self.max_sequences
        leaving = self._claim(sequence, self.running, places, len(members), _rows, _rows)
        if leaving is None:
            return False
        if not self.begin(sequence):
            self.queue.remove(sequence)
            return False
        if not self.blocks.claim(self._most(sequence)):
            self.withdraw(sequence)
            self.order.crowded = True
            return False
        for member in members:
            member.adopt(self.blocks)
        size = self.blocks.block_size
        total = sum(-(-len(m.tokens) // size) for m in members)
        lacking = total - _blocks(sequence) - self.blocks.available
        lacking -= sum(self._unshared(s) for s in leaving)
        stay = [s for s in self.running if s not in leaving]
        more = self._claim(sequence, stay, lacking, total, _blocks, self._unshared)
        if more is None:
            self._give_back(sequence)
            return False
        for victim in [*leaving, *more]:
            self._preempt(victim, batch)
        self.queue.take(sequence)
        if not sequence.ticketed:
            sequence.ticket = next(self._tickets)
        self._prepay(sequence)
        self.running[sequence] = None
        return True

    def _claim(
        self,
        newcomer: Sequence,
        among: Collection[Sequence],
        lacking: int,
        need: int,
        measure: Callable[[Sequence], int],
        freed: Callable[[Sequence], int],
    ) -> list[Sequence] | None:
        if lacking <= 0:
            return []
        if newcomer.ticketed:
            return None
        return claim(newcomer, among, lacking, need, measure, freed)

    def _most(self, sequence: Sequence) -> int:
        """Blocks that it may need."""
        return sum(-(-m.most // self.blocks.block_size) for m in sequence.members)

    def _rows(self) -> int:
        return sum(_rows(s) for s in self.running)

    def _unshared(self, sequence: Sequence) -> int:
        return sum(self.blocks.references(b) == 1 for m in sequence.members for b in m.blocks)

    def _prepay(self, sequence: Sequence) -> None:
        """Charge what it is to compute of its prompt, so that the next turn takes note of it."""
        for m in sequence.members:
            tokens = len(m.tokens) - max(m.charged, m.computed)
            if tokens > 0:
                self.queue.charge(sequence, self.cost.per_token * tokens)
                m.charged = len(m.tokens)

    def _chunk(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Schedule the next part of a prompt; the number of tokens it takes. Members compute theirs
        up to their tails, then these in lockstep, so that the rows that belong together are in one
        step; all at once where that fits."""
        if budget <= 0:
            return 0
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

    def _decode(self, sequence: Sequence, batch: Batch) -> int:
        """Schedule the newest token, of each member; the number of tokens that it takes."""
        for member in sequence.members:
            if not self._grow(member, member.uncomputed_prefix + 1, batch):
                return 0
        for member in sequence.members:
            self._fill(member, batch)
            batch.decodes.append(Scheduled(member, member.computed, 1))
        return len(sequence.members)

    def _grow(self, sequence: Sequence, count: int, batch: Batch) -> bool:
        """Give the sequence blocks for `count` more tokens, preempting others if need be. False if
        its own request was the one to go."""
        need = -(-(sequence.computed + count) // self.blocks.block_size)
        while len(sequence.blocks) < need:
            try:
                sequence.blocks.append(self.blocks.take())
            except OutOfBlocks:
                victim = give_way(self.running)
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
        self.queue.put_back(sequence)

    def _renumber(self, renamed: Mapping[int, int]) -> None:
        """Blocks have moved, between two steps."""
        for sequence in self.running:
            for member in sequence.members:
                member.blocks[:] = [renamed.get(block, block) for block in member.blocks]

    def _give_back(self, sequence: Sequence) -> None:
        for member in sequence.members:
            self.blocks.release(member.blocks)
            member.blocks, member.hashes, member.computed = [], [], 0


def _rows(sequence: Sequence) -> int:
    return len(sequence.members)


def _blocks(sequence: Sequence) -> int:
    return sum(len(m.blocks) for m in sequence.members)
