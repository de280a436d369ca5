"""Room: who gives way when cache blocks or places in the batch run out.

Whoever's place is first never does, so somebody always advances. Only a request that has never
been admitted takes anything from others on entering, each once; so no two drive each other out for
ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias

from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.sequence import Sequence

Key: TypeAlias = tuple[str, ...]


def give_way(running: Collection[Sequence]) -> Sequence:
    """Who is preempted when one that runs needs a block and none is left: of the lowest level, of
    the tenant and then the flow that hold the most blocks, the last in place."""
    first = min(running, key=lambda s: s.place)
    held = _holdings(running, _blocks)
    others = [s for s in running if s is not first] or [first]
    return max(others, key=lambda s: (-s.level, held[_tenant(s)], held[_flow(s)], s.ticket))


def claim(
    newcomer: Sequence,
    running: Collection[Sequence],
    lacking: int,
    need: int,
    measure: Callable[[Sequence], int],
    freed: Callable[[Sequence], int],
) -> list[Sequence] | None:
    """Whom a new request may drive out for the `lacking` part of the `need` units it takes; None
    if it has no right to so many. It has a right to them from a tenant that is left, without them,
    with no fewer than the newcomer's will have; within its own tenant, likewise from a flow. From
    higher levels it takes nothing.

    measure: units that a sequence holds; freed: how many of them nobody else holds.
    """
    if not running:
        return None
    first = min(running, key=lambda s: s.place)
    rest = [s for s in running if s is not first and s.level <= newcomer.level]
    held = _holdings(running, measure)
    mine = {kind: held[kind(newcomer)] + need for kind in (_tenant, _flow)}
    found: list[Sequence] = []
    while lacking > 0:
        able = []
        for s in rest:
            kind = _flow if _tenant(s) == _tenant(newcomer) else _tenant
            if held[kind(s)] - measure(s) >= mine[kind] and freed(s) > 0:
                able.append(s)
        if not able:
            return None
        victim = max(able, key=lambda s: (-s.level, held[_tenant(s)], held[_flow(s)], s.ticket))
        rest.remove(victim)
        found.append(victim)
        lacking -= freed(victim)
        held[_tenant(victim)] -= measure(victim)
        held[_flow(victim)] -= measure(victim)
    return found


def equal_parts(amount: int, needs: Mapping[str, int]) -> list[tuple[str, int]]:
    """`amount` in equal parts, but none larger than is needed: what one leaves is the others'."""
    found = []
    for i, (name, need) in enumerate(sorted(needs.items(), key=lambda item: item[1])):
        part = min(need, max(0, amount) // (len(needs) - i))
        found.append((name, part))
        amount -= part
    return found


def prompt_shares(
    prompts: list[Sequence], head: Sequence | None, budget: int, batch: Batch
) -> list[tuple[Sequence, int]]:
    """How many tokens each prompt gets of the step's `budget`: equal parts for the tenants, of each
    for its flows, in each flow first come first served; nobody more than it needs. head: one whose
    part is left for it, as its flow's. What the batch computes of prompts already is of the parts.
    """
    given: Counter[Key] = Counter()
    for part in batch.chunks:
        given[_flow(part.sequence.lead)] += part.count
    needs = given.copy()
    if head is not None:
        needs[_flow(head)] += head.prompt_tokens
    for s in prompts:
        needs[_flow(s)] += _pending(s)
    tenants: dict[str, dict[str, int]] = {}
    for (tenant, label), need in needs.items():
        tenants.setdefault(tenant, {})[label] = need
    left: dict[Key, int] = {
        (tenant, label): share - given[tenant, label]
        for tenant, part in equal_parts(budget, {t: sum(f.values()) for t, f in tenants.items()})
        for label, share in equal_parts(part, tenants[tenant])
    }
    shares = []
    budget -= given.total()
    for s in prompts:
        share = max(0, min(_pending(s), left[_flow(s)], budget))
        left[_flow(s)] -= share
        budget -= share
        shares.append((s, share))
    return shares


def _pending(sequence: Sequence) -> int:
    return sum(m.pending for m in sequence.members)


def _blocks(sequence: Sequence) -> int:
    return sum(len(m.blocks) for m in sequence.members)


def _tenant(sequence: Sequence) -> Key:
    return (sequence.request.tenant,)


def _flow(sequence: Sequence) -> Key:
    return (sequence.request.tenant, sequence.flow)


def _holdings(running: Iterable[Sequence], measure: Callable[[Sequence], int]) -> Counter[Key]:
    held: Counter[Key] = Counter()
    for s in running:
        held[_tenant(s)] += measure(s)
        held[_flow(s)] += measure(s)
    return held
