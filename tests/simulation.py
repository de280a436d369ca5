"""A scheduler without a model: what a step computes is believed, and takes what `cost` says."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.core import Request, SamplingParams
from deltaserve.server.engine.cost import CostModel, StepLoad
from deltaserve.server.engine.detokenizer import Detokenizer
from deltaserve.server.engine.kv_cache import BlockManager, chain_root
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence, Span


class Nowhere:
    def deliver(self, outputs: object) -> None: ...


def begin(s: Sequence) -> bool:
    s.begin(None, s.spans, chain_root(s.label, s.request.salt))
    return True


@dataclass
class Simulation:
    """slower: times as long each step takes as `cost` says, as on a slower machine. now, longest:
    simulated seconds, of the clock and of the longest step. first, ended: when each sequence had
    its first token, and its last.
    """

    blocks: int = 1200
    block_size: int = 4
    max_batch_tokens: int = 64
    max_sequences: int = 8
    inter_token_target: float | None = None
    adapter_bytes: int = 50 << 20
    slower: float = 1.0
    longest: float = 0.0
    now: float = 0.0
    steps: int = 0
    first: dict[Sequence, float] = field(default_factory=dict)
    ended: dict[Sequence, float] = field(default_factory=dict)
    later: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cost = CostModel(200 << 20)
        self.scheduler = Scheduler(
            BlockManager(self.blocks, self.block_size),
            self.max_batch_tokens,
            self.max_sequences,
            cost=self.cost,
            inter_token_target=self.inter_token_target,
        )
        self.scheduler.begin = begin
        self._adapters: dict[str, Residency] = {}
        self._made = 0

    def adapter(self, name: str) -> Residency:
        """Resident from the first time on."""
        known = self._adapters.get(name)
        if known is None:
            slot = len(self._adapters) + 1
            known = Residency(name, f"/{name}", slot=slot, nbytes=self.adapter_bytes)
            self._adapters[name] = known
        return known

    def make(
        self,
        adapter: str = "",
        *,
        tenant: str = "",
        user: str = "",
        prompt: int = 16,
        answer: int = 8,
        priority: int = 0,
        at: float | None = None,
    ) -> Sequence:
        self._made += 1
        sampling = SamplingParams(max_tokens=answer)
        ids = tuple(self._made * 1000 + i for i in range(prompt))
        name = f"s{self._made}"
        request = Request(name, ids, sampling, priority=priority, tenant=tenant, user=user)
        held = (self.adapter(adapter),) if adapter else ()
        made = Sequence(request, Nowhere(), held, Detokenizer(None, ()))
        made.spans = (Span(0, tuple((a.slot, 1.0) for a in held)),)
        made.submitted = self.now if at is None else at
        return made

    def submit(self, adapter: str = "", **how: object) -> Sequence:
        """Now, or when it is time for it (`at`)."""
        sequence = self.make(adapter, **how)  # type: ignore[arg-type]
        if sequence.submitted > self.now:
            self.later.append(sequence)
            self.later.sort(key=lambda s: s.submitted)
        else:
            self.scheduler.add(sequence)
        return sequence

    def step(self) -> Batch:
        """One step, after those who come by then; time goes on to them if nothing else is there."""
        busy = self.scheduler.running or self.scheduler.waiting
        if not busy and self.later:
            self.now = max(self.now, self.later[0].submitted)
        while self.later and self.later[0].submitted <= self.now:
            self.scheduler.add(self.later.pop(0))
        self.scheduler.order.wanting(self.now)
        running = self.scheduler.running
        first = min(running, key=lambda s: s.place) if running else None
        batch = self.scheduler.schedule(self.now)
        assert first is None or any(p.sequence.place <= first.place for p in batch.parts), (
            "neither the first nor one of a higher level, new in this step, advances"
        )
        load = self.scheduler.charge(batch)
        if batch:
            seconds = self.slower * self.cost.seconds(load.tokens, load.adapter_bytes)
            self.now, self.longest = self.now + seconds, max(self.longest, seconds)
        self.steps += 1
        self._advance(batch)
        self.scheduler.check_integrity()
        return batch

    def _advance(self, batch: Batch) -> None:
        self.scheduler.advance(batch)
        for s in dict.fromkeys(part.sequence for part in batch.parts):
            if s.computed < len(s.tokens):
                continue
            s.tokens.append(7)
            s.outputs += 1
            self.first.setdefault(s, self.now)
            s.first_token = s.first_token or self.now
            if s.outputs >= s.request.sampling.max_tokens:
                self.ended[s] = self.now
                self.scheduler.remove(s)

    def run(self, most: int = 100_000) -> None:
        """Until everything has ended, in at most so many steps."""
        while self.scheduler.running or self.scheduler.waiting or self.later:
            assert self.steps < most, f"not over after {most} steps"
            self.step()

    def until(self, sequence: Sequence, most: int = 100_000) -> float:
        """Seconds from its arrival to its first token."""
        while sequence not in self.first:
            assert self.steps < most, f"no token after {most} steps"
            self.step()
        return self.first[sequence] - sequence.submitted

    def alone(self, *sequences: Sequence) -> float:
        """Seconds that these take in one step, on a machine of their own."""
        load = StepLoad()
        for s in sequences:
            load.add(s, len(s.request.prompt_ids))
        return self.cost.seconds(load.tokens, load.adapter_bytes)
