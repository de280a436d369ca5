"""Machine code as a graph: its instructions, where they jump, and the loops that makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction; `op` is the opcode with its suffixes ("LDG.E.128").

    targets: the indices it may jump to, in the same list.
    falls: whether the next instruction may follow it.
    """

    op: str
    targets: tuple[int, ...] = ()
    falls: bool = True

    @property
    def base(self) -> str:
        return self.op.split(".", 1)[0]


Code = list[Instruction]


def natural_loops(code: Code) -> list[frozenset[int]]:
    """The loops' bodies as sets of indices, in order of their heads.

    A body holds whatever may run between its head and the jump back, wherever it stands: waiting
    code that was moved behind the end of the program belongs to the loop that waits.
    """
    if not code:
        return []
    following = [list(_successors(code, i)) for i in range(len(code))]
    order = _reverse_postorder(following)
    preceding: list[list[int]] = [[] for _ in code]
    for node in order:
        for successor in following[node]:
            preceding[successor].append(node)
    dominator = _immediate_dominators(order, preceding)
    bodies: dict[int, set[int]] = {}
    for tail in order:
        for head in following[tail]:
            if _dominates(head, tail, dominator):
                bodies.setdefault(head, {head}).update(_body(head, tail, preceding))
    return [frozenset(bodies[head]) for head in sorted(bodies)]


def innermost(loops: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Those of `loops` that contain no other of them."""
    return [loop for loop in loops if not any(other < loop for other in loops)]


def _successors(code: Code, index: int) -> Iterator[int]:
    instruction = code[index]
    yield from instruction.targets
    if instruction.falls and index + 1 < len(code):
        yield index + 1


def _reverse_postorder(following: list[list[int]]) -> list[int]:
    seen = {0}
    order: list[int] = []
    stack = [(0, iter(following[0]))]
    while stack:
        node, successors = stack[-1]
        fresh = next((n for n in successors if n not in seen), None)
        if fresh is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(following[fresh])))
    return order[::-1]


def _immediate_dominators(order: list[int], preceding: list[list[int]]) -> dict[int, int]:
    """By iteration to a fixed point (Cooper, Harvey and Kennedy, 2001)."""
    rank = {node: i for i, node in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [p for p in preceding[node] if p in dominator]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    if rank[best] > rank[other]:
                        best = dominator[best]
                    else:
                        other = dominator[other]
            if dominator.get(node) != best:
                dominator[node] = best
                changed = True
    return dominator


def _dominates(node: int, other: int, dominator: dict[int, int]) -> bool:
    while other != node and dominator[other] != other:
        other = dominator[other]
    return other == node


def _body(head: int, tail: int, preceding: list[list[int]]) -> set[int]:
    body = {head, tail}
    stack = [tail] if tail != head else []
    while stack:
        for node in preceding[stack.pop()]:
            if node not in body:
                body.add(node)
                stack.append(node)
    return body
