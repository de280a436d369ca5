"""Sequence: one request on its way through the engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from deltaserve.kernels.primitives import Prefix, PrefixKV
from deltaserve.kernels.segments import Mix
from deltaserve.server.engine.core import (
    Outbox,
    Request,
    ServedAdapter,
    ServedMember,
    TokenDisagreement,
    TokenLogprob,
)
from deltaserve.server.engine.kv_cache import BlockManager, chain
from deltaserve.server.engine.masks import Chosen

if TYPE_CHECKING:
    from deltaserve.server.engine.detokenizer import Detokenizer
    from deltaserve.server.engine.group import Group
    from deltaserve.server.engine.prompt_lookup import Drafter
    from deltaserve.server.engine.residency import Residency

_arrivals = itertools.count()


class Span(NamedTuple):
    """The adapters that act on a sequence's tokens from `start` on, up to the next span."""

    start: int
    mix: Mix


@dataclass(eq=False)
class Sequence:
    """tokens: virtual tokens (negative numbers), the prompt, then the outputs. computed: how many
    of them have their keys and values in `blocks`. The fields of the second group are set when the
    request's adapters are resident; spans: which of them act from which token on, ascending from 0.
    group: of which it is a member, if the request is a combination. Its first member, the lead,
    stands for the request: it alone waits, runs, has scores and times, and ends. sibling: the one
    whose prompt, the same, is computed for both.
    """

    request: Request
    outbox: Outbox
    adapters: tuple[Residency, ...]
    detokenizer: Detokenizer
    generator: torch.Generator | None = None
    drafter: Drafter | None = None
    group: Group | None = None
    sibling: Sequence | None = None
    arrival: int = field(default_factory=lambda: next(_arrivals))
    submitted: float = field(default_factory=time.monotonic)
    level: int = 0  # its priority, until it has waited too long
    ticket: int = -1  # number of its first admission
    charged: int = 0  # tokens that its flow has been charged for
    reached: int = 0  # the most of them that have been computed

    tokens: list[int] = field(default_factory=list)
    virtual: int = 0
    prefix: Prefix | None = None
    spans: tuple[Span, ...] = (Span(0, ()),)
    root: bytes = b""
    turns: Mapping[int, bytes] = field(default_factory=dict)

    most: int = 0  # tokens that it may come to
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    outputs: int = 0
    cached: int = 0
    scores: list[TokenLogprob] = field(default_factory=list)
    disagreements: list[TokenDisagreement] = field(default_factory=list)  # one for each score

    adapter_ready: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    admitted: bool = False
    ended: bool = False
    chosen: tuple[Chosen, ...] = ()  # modules of each adapter
    slots: tuple[int, ...] = ()  # of each adapter, as chosen

    def __post_init__(self) -> None:
        self.level = self.request.priority

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def place(self) -> tuple[int, int]:
        """The order of those that run: higher level, then earlier admission. It stays theirs when
        they are preempted."""
        return (-self.level, self.ticket)

    @property
    def ticketed(self) -> bool:
        """It has been admitted before; if it waits, then to return."""
        return self.ticket >= 0

    @property
    def lead(self) -> Sequence:
        """The one that stands for its request."""
        return self.group.members[0] if self.group is not None else self

    @property
    def members(self) -> tuple[Sequence, ...]:
        """All sequences of its request."""
        return self.group.members if self.group is not None else (self,)

    @property
    def held(self) -> tuple[Residency, ...]:
        """The adapters of its request, each once."""
        if self.group is None:
            return self.adapters
        return tuple(dict.fromkeys(a for m in self.members for a in m.adapters))

    @property
    def label(self) -> str:
        """What the metrics call the adapters of its request; those of every request are left out,
        members stand side by side."""
        return "|".join("+".join(a.name for a in m.adapters if not a.patch) for m in self.members)

    @property
    def flow(self) -> str:
        """What it is a part of, in its tenant: the user's requests for the same adapters."""
        user = self.request.user
        return f"{user}\0{self.label}" if user else self.label

    @property
    def resident(self) -> bool:
        """Whether all adapters of its request are in memory."""
        return all(a.ready for m in self.members for a in m.adapters)

    @property
    def early(self) -> bool:
        """Its sibling has yet to compute the prompt."""
        return self.sibling is not None and not (self.sibling.ended or self.sibling.outputs)

    @property
    def decoding(self) -> bool:
        """The next step computes one token, the newest, of each member."""
        if self.group is not None:
            return all(m.pending == m.tail == 1 for m in self.members)
        return self.outputs > 0 and self.computed == len(self.tokens) - 1

    @property
    def tail(self) -> int:
        """Tokens at the end that are computed in the same steps as those of the other members."""
        score_from = self.request.sampling.score_from
        if self.group is None:
            return 0
        if score_from is None or self.outputs:
            return 1
        return len(self.tokens) - (self.virtual + score_from - 1)

    @property
    def pending(self) -> int:
        """Tokens that are yet to be computed; those with given keys and values are not."""
        return len(self.tokens) - self.computed - self.uncomputed_prefix

    @property
    def prompt_tokens(self) -> int:
        """Of its request, all members' together."""
        return sum(len(m.request.prompt_ids) for m in self.members)

    @property
    def prompt_end(self) -> int:
        """Index in `tokens` behind the prompt."""
        return self.virtual + len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.prompt_end :]

    @property
    def served_by(self) -> tuple[ServedAdapter, ...]:
        """Of a request that is no combination."""
        return self._served if self.group is None else ()

    @property
    def served_members(self) -> tuple[ServedMember, ...]:
        """Of a combination."""
        if self.group is None:
            return ()
        given = self.group.combination.members
        each = zip(self.members, given, strict=True)
        return tuple(ServedMember(m._served, member.weight) for m, member in each)

    @property
    def _served(self) -> tuple[ServedAdapter, ...]:
        return tuple(
            ServedAdapter(a.name, a.digest, ref.strength, ref.modules, ref.patch)
            for a, ref in zip(self.adapters, self.request.adapters, strict=True)
        )

    def span_at(self, position: int) -> Span:
        """The span of the token at `position`."""
        if len(self.spans) == 1:
            return self.spans[0]
        return next(s for s in reversed(self.spans) if s.start <= position)

    def span_end(self, position: int) -> int:
        """Where the span of the token at `position` ends; the number of tokens for the last."""
        return next((s.start for s in self.spans if s.start > position), len(self.tokens))

    def begin(
        self,
        prefix: Prefix | None,
        spans: tuple[Span, ...],
        root: bytes,
        turns: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        """The adapters are resident: lay out the tokens. root and turns: see `kv_cache.chain`."""
        self.prefix, self.spans, self.root, self.turns = prefix, spans, root, turns
        if not self.tokens:
            self.virtual = len(prefix) if prefix is not None else 0
            self.tokens = [-1 - i for i in range(self.virtual)] + list(self.request.prompt_ids)

    def adopt(self, manager: BlockManager) -> None:
        """Take up what the sibling holds, or the cached prefix, leaving at least one token to
        compute."""
        limit = len(self.tokens) - 1
        if self.request.sampling.score_from is not None and self.outputs == 0:
            limit = min(limit, self.virtual + self.request.sampling.score_from - 1)
        other = self.sibling
        if (
            other is not None
            and other.blocks
            and (other.root, other.turns) == (self.root, self.turns)
        ):
            most = min(limit, other.computed, self.prompt_end) // manager.block_size
            self.blocks = manager.share(other.blocks[:most], len(self.tokens))
            self.hashes = other.hashes[:most]
        else:
            self.blocks, self.hashes = manager.match(self.root, self.tokens, limit, self.turns)
        self.computed = len(self.blocks) * manager.block_size
        if self.outputs == 0:
            self.cached = max(0, self.computed - self.virtual)

    def publish(self, manager: BlockManager) -> None:
        """Index the blocks that became full."""
        size = manager.block_size
        for i in range(len(self.hashes), self.computed // size):
            parent = self.hashes[-1] if self.hashes else self.root
            tokens = self.tokens[i * size : (i + 1) * size]
            self.hashes.append(chain(parent, i, tokens, self.turns))
            manager.publish(self.blocks[i], self.hashes[-1])

    @property
    def uncomputed_prefix(self) -> int:
        """Virtual tokens whose keys and values are given, not computed, and not yet written."""
        if isinstance(self.prefix, PrefixKV) and self.computed < self.virtual:
            return self.virtual - self.computed
        return 0
