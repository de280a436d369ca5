"""Question: one batch of one group, asked of our kernels and of the peers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

from torch import Tensor

from gpu_kernels import ours, shapes
from gpu_kernels.case import Case
from gpu_kernels.data import Problem, weight
from gpu_kernels.peers.work import Work
from gpu_kernels.shapes import Group

BASE = "int4"
"""The form of the base that our deltas are added to."""


@dataclass(frozen=True)
class Question:
    """nbytes: of the adapters, at least. form: what kind they are, for the table. problem: makes
    the adapters and the batch the first time, and gives the same ones again."""

    part: str
    group: Group
    tokens: int
    adapters: int
    form: str
    nbytes: int
    problem: Callable[[], Problem]

    def of(self, part: str) -> Question:
        """The same question in another part."""
        return replace(self, part=part)

    def own(self) -> Iterator[Case]:
        """The base alone and with the deltas, on the same weights and activations."""
        yield self._own("base", lambda n: self._held.base(n), lambda: self._held.expected_base())
        yield self._own(
            "base+deltas", lambda n: self._held.deltas(n), lambda: self._held.expected()
        )

    def own_with_room(self) -> Case:
        """The same step in a plan with room for any other, as a server's graph is captured."""
        case = self._own(
            "base+deltas",
            lambda n: self._held.deltas(n, ours.ROOM),
            lambda: self._held.expected(),
        )
        return replace(case, where={**self._where, "form": f"{self.form}, room for any"})

    def peers(self, peers: Mapping[str, Callable[[Problem, int], Work]]) -> Iterator[Case]:
        """What each peer adds to a finished base product: y is read and written once more."""
        activations = shapes.activation_bytes(self.group, self.tokens)
        again = 2 * self.tokens * self.group.out_features
        for name, peer in peers.items():
            yield Case(
                self.part,
                name,
                "deltas",
                partial(self._ask, peer),
                lambda: self.problem().delta,
                self.nbytes + activations + again,
                self.nbytes,
                where=self._where,
            )

    def with_base(
        self, name: str, peer: Callable[[Problem, Tensor, int, bool], Work]
    ) -> Iterator[Case]:
        """A peer that works beside its own base product, of 16-bit weights: with adapters and
        without. peer: takes the problem, the weights, how many copies, whether with adapters."""
        weights = cache(lambda: weight(self.group))

        def expected(added: bool) -> Tensor:
            problem = self.problem()
            base = problem.x.double() @ weights().double().T
            return base + problem.delta if added else base

        for added in (False, True):
            held = shapes.base_bytes(self.group, "16-bit") + (self.nbytes if added else 0)
            yield Case(
                self.part,
                name,
                "base+deltas" if added else "base",
                lambda n, added=added: peer(self.problem(), weights(), n, added),
                partial(expected, added),
                held + shapes.activation_bytes(self.group, self.tokens),
                held,
                shapes.operations(self.group, self.tokens),
                self._where,
            )

    def _ask(self, peer: Callable[[Problem, int], Work], copies: int) -> Work:
        return peer(self.problem(), copies)

    def _own(self, what: str, make: Callable[[int], Work], expected: Callable[[], Tensor]) -> Case:
        held = shapes.base_bytes(self.group, BASE) + (self.nbytes if what != "base" else 0)
        nbytes = held + shapes.activation_bytes(self.group, self.tokens)
        work = shapes.operations(self.group, self.tokens)
        return Case(self.part, ours.NAME, what, make, expected, nbytes, held, work, self._where)

    @cached_property
    def _held(self) -> ours.Held:
        return ours.Held(self.problem(), BASE)

    @property
    def _where(self) -> dict[str, Any]:
        return {
            "group": self.group.name,
            "tokens": self.tokens,
            "adapters": self.adapters,
            "form": self.form,
        }
