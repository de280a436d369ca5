"""Intake: what is made of a request that comes, and whether it is taken, by what waits already and
how long it can wait."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.backlog import Backlog, expected_wait, overloaded
from deltaserve.server.engine.core import FinishReason, Outbox, Request
from deltaserve.server.engine.detokenizer import Detokenizer
from deltaserve.server.engine.group import Group, located, members
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.engine.speculation import Speculator
from deltaserve.server.errors import Overloaded, RequestError

RECENT = 0.05
"""Weight of the newest answer in the expected length of answers."""


class Intake:
    """Not locked: the caller sees to it. What it reads of the scheduler may be a step old."""

    def __init__(self, backlog: Backlog, scheduler: Scheduler) -> None:
        self._backlog = backlog
        self._scheduler = scheduler
        self._answer: float | None = None

    def enter(self, sequence: Sequence, held: int) -> tuple[Sequence, Overloaded] | None:
        """As `Backlog.enter`; Overloaded also if the first token is not to be expected within the
        request's `max_wait`."""
        most = sequence.request.max_wait
        if most is not None and (seconds := self.expected(sequence)) > most:
            raise overloaded(
                f"max_wait_seconds: {most:g} s, and the first token is expected in {seconds:.1f} s",
                "max_wait",
                seconds - most,
            )
        return self._backlog.enter(sequence, held, lambda: self.expected(sequence))

    def leave(self, sequence: Sequence) -> None:
        """It begins, or is over."""
        self._backlog.leave(sequence)

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        """It is over."""
        self._backlog.leave(sequence)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            known = sequence.outputs if self._answer is None else self._answer
            self._answer = known + RECENT * (sequence.outputs - known)

    def expected(self, sequence: Sequence) -> float:
        """Seconds until its first token, were it to come now."""
        s = self._scheduler
        running = list(s.running)
        most = sequence.request.sampling.max_tokens
        loads = [a.load_seconds for a in sequence.held if not a.ready]
        return max(loads, default=0.0) + expected_wait(
            self._backlog.ahead(sequence),
            sequence.prompt_tokens,
            s.cost,
            running=sum(len(r.members) for r in running),
            answer=most if self._answer is None else self._answer,
            adapter_bytes=sum(a.nbytes for a in {a for r in running for a in r.held}),
            max_batch_tokens=s.max_batch_tokens,
            max_sequences=s.max_sequences,
        )


def make_sequence(
    request: Request,
    outbox: Outbox,
    adapters: AdapterCache,
    tokenizer: Tokenizer | None,
    speculator: Speculator | None,
    now: float,
) -> Sequence:
    """The sequence of a request; the first member's, with its group, of a combination. Its adapters
    are counted as in flight."""
    each, p = members(request), request.sampling
    generator = None
    if p.temperature > 0:
        generator = torch.Generator()
        if p.seed is None:
            generator.seed()
        else:
            generator.manual_seed(p.seed)
    detokenizer = Detokenizer(
        request.tokenizer or tokenizer,
        each[0].prompt_ids,
        p.stop,
        skip_special_tokens=p.skip_special_tokens,
    )
    made: list[Sequence] = []
    try:
        for i, one in enumerate(each):
            with located(i, request):
                held = adapters.acquire(one.adapters)
            made.append(Sequence(one, outbox, held, detokenizer, generator, submitted=now))
    except RequestError:
        for sequence in made:
            adapters.release(sequence.adapters, running=False)
        raise
    if request.combination is not None:
        group = Group(request.combination, tuple(made))
        for sequence in made:
            sequence.group = group
    elif speculator is not None:
        made[0].drafter = speculator.drafter(request)
    return made[0]
