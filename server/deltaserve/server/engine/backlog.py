"""Backlog: the requests that have not begun, who is turned away when there are too many, and how
long a new one would wait."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from deltaserve.server.engine.cost import CostModel
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.errors import Overloaded

LEAST_DELAY, MOST_DELAY = 0.1, 60.0
"""Seconds of the hint when to try again."""


class Ahead(NamedTuple):
    """What is served before a new request: sequences, and tokens of their prompts."""

    requests: float
    tokens: float


@dataclass(eq=False, slots=True)
class _Flow:
    tenant: str
    label: str
    waiting: dict[int, OrderedDict[Sequence, None]] = field(default_factory=dict)

    def work(self, level: int) -> Ahead:
        """Of those of exactly this level."""
        found = self.waiting.get(level, ())
        return Ahead(sum(len(s.members) for s in found), sum(s.prompt_tokens for s in found))

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))


class Backlog:
    """Not locked: the caller sees to it. max_requests: in all, those that run included.
    max_per_flow: that wait, of one tenant for one adapter; None for no limit of its own."""

    def __init__(self, max_requests: int, max_per_flow: int | None = None) -> None:
        self.max_requests = max_requests
        self.max_per_flow = max_per_flow
        self._flows: dict[tuple[str, str], _Flow] = {}

    def enter(
        self, sequence: Sequence, held: int, delay: Callable[[], float]
    ) -> tuple[Sequence, Overloaded] | None:
        """Take in a new request. -> the one that has to go for it, if one has, and what to tell
        it. Overloaded if it has to go itself: its flow is full, or the server is and nobody of a
        lower priority, or of a flow with more that wait, is there to go instead.

        held: requests that wait or run. delay: seconds until the backlog will have shrunk.
        """
        flow = self._flow(sequence)
        whose = _whose(sequence)
        if self.max_per_flow is not None and len(flow) >= self.max_per_flow:
            self._tidy(flow)
            raise overloaded(
                f"{self.max_per_flow} requests{whose} wait, the limit is {self.max_per_flow}",
                "flow_full",
                delay(),
            )
        victim = None
        if held >= self.max_requests:
            victim = self._least_entitled(sequence)
        flow.waiting.setdefault(sequence.request.priority, OrderedDict())[sequence] = None
        full = f"{held} requests wait or run, the limit is {self.max_requests}"
        if victim is sequence:
            self.leave(sequence)
            raise overloaded(full, "queue_full", delay())
        if victim is None:
            return None
        self.leave(victim)
        error = overloaded(f"{full}; the last one{_whose(victim)} gave way", "displaced", delay())
        return victim, error

    def leave(self, sequence: Sequence) -> None:
        """It begins, or is over."""
        flow = self._flows.get((sequence.request.tenant, sequence.flow))
        level = sequence.request.priority
        if flow is None or sequence not in flow.waiting.get(level, ()):
            return
        del flow.waiting[level][sequence]
        if not flow.waiting[level]:
            del flow.waiting[level]
        self._tidy(flow)

    def ahead(self, sequence: Sequence) -> Ahead:
        """What fair turns serve before a request that comes now: all of higher levels, its own
        flow's of its level, and of every other flow as much as of its own with it; tenants
        likewise."""
        level, tenant = sequence.request.priority, sequence.request.tenant
        higher, by_tenant = Ahead(0, 0), dict[str, list[tuple[str, Ahead]]]()
        for flow in self._flows.values():
            for other in flow.waiting:
                if other > level:
                    higher = _sum(higher, flow.work(other))
            by_tenant.setdefault(flow.tenant, []).append((flow.label, flow.work(level)))
        own = by_tenant.get(tenant, [])
        mine = dict(own).get(sequence.flow, Ahead(0, 0))
        turn = _sum(mine, Ahead(len(sequence.members), sequence.prompt_tokens))
        among = mine
        for label, work in own:
            if label != sequence.flow:
                among = _sum(among, _least(work, turn))
        turn = _sum(among, Ahead(len(sequence.members), sequence.prompt_tokens))
        for name, flows in by_tenant.items():
            if name != tenant:
                total = Ahead(0, 0)
                for _, work in flows:
                    total = _sum(total, work)
                among = _sum(among, _least(total, turn))
        return _sum(higher, among)

    def _least_entitled(self, newcomer: Sequence) -> Sequence:
        """Of the lowest priority; of the tenant, then the flow with most that wait; the last. The
        newcomer itself unless another's backlog is larger than its own becomes with it."""
        level = min((min(f.waiting) for f in self._flows.values() if f.waiting), default=None)
        if level is None or level > newcomer.request.priority:
            return newcomer
        of_flow: dict[tuple[str, str], int] = {}
        of_tenant: dict[str, int] = {}
        for key, flow in self._flows.items():
            of_flow[key] = len(flow)
            of_tenant[key[0]] = of_tenant.get(key[0], 0) + len(flow)
        if level == newcomer.request.priority:
            mine = (newcomer.request.tenant, newcomer.flow)
            of_flow[mine] = of_flow.get(mine, 0) + 1
            of_tenant[mine[0]] = of_tenant.get(mine[0], 0) + 1
            largest = max(of_flow, key=lambda k: (of_tenant[k[0]], of_flow[k], k == mine))
            if largest == mine:
                return newcomer
        candidates = [k for k, f in self._flows.items() if level in f.waiting]
        chosen = max(candidates, key=lambda k: (of_tenant[k[0]], of_flow[k]))
        return next(reversed(self._flows[chosen].waiting[level]))

    def _flow(self, sequence: Sequence) -> _Flow:
        key = (sequence.request.tenant, sequence.flow)
        return self._flows.setdefault(key, _Flow(*key))

    def _tidy(self, flow: _Flow) -> None:
        if not flow.waiting:
            self._flows.pop((flow.tenant, flow.label), None)

    def __iter__(self) -> Iterator[Sequence]:
        return (s for f in self._flows.values() for q in f.waiting.values() for s in q)

    def __len__(self) -> int:
        return sum(map(len, self._flows.values()))


def expected_wait(
    ahead: Ahead,
    prompt: int,
    cost: CostModel,
    *,
    running: int,
    answer: float,
    adapter_bytes: int,
    max_batch_tokens: int,
    max_sequences: int,
) -> float:
    """Seconds from now to the first token of a request with `prompt` tokens.

    The prompts ahead and its own take their steps beside the `running` sequences' tokens. If they
    and those ahead fill the batch's `max_sequences` places, so many of them have to end first as
    are too many; `answer` tokens are expected of each. adapter_bytes: that a step reads.
    """
    tokens = ahead.tokens + prompt
    room = max(1, max_batch_tokens - running)
    steps = -(-tokens // room)
    beside = cost.seconds(running, adapter_bytes)
    seconds = steps * beside + tokens * cost.per_token
    too_many = running + ahead.requests + 1 - max_sequences
    if too_many > 0:
        seconds += too_many / max_sequences * answer * cost.seconds(max_sequences, adapter_bytes)
    return seconds


def overloaded(text: str, reason: str, delay: float) -> Overloaded:
    """With the hint to try again after `delay` seconds."""
    seconds = min(max(delay, LEAST_DELAY), MOST_DELAY)
    return Overloaded(f"{text}: try again in {seconds:.1f} s", reason=reason, retry_after=seconds)


def _whose(sequence: Sequence) -> str:
    asked = f" for {sequence.label}" if sequence.label else " for the base"
    tenant = sequence.request.tenant
    return f" of {tenant!r}{asked}" if tenant else asked


def _sum(a: Ahead, b: Ahead) -> Ahead:
    return Ahead(a.requests + b.requests, a.tokens + b.tokens)


def _least(a: Ahead, b: Ahead) -> Ahead:
    return Ahead(min(a.requests, b.requests), min(a.tokens, b.tokens))
