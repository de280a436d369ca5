"""Admission: from a request to a laid-out sequence: the server's patches, which mixes can be
served, and what is known once the adapters are resident: modules, slots, spans and cache keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from deltaserve.server.engine.activation import (
    NEVER,
    Active,
    cache_keys,
    invoked_at,
    spans,
)
from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.core import AdapterRef, Request
from deltaserve.server.engine.group import located
from deltaserve.server.engine.kv_cache import BlockManager
from deltaserve.server.engine.masks import Chosen, choose, masked
from deltaserve.server.engine.residency import Residency
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.engine.validate import Limits, check_length, check_together
from deltaserve.server.errors import InvalidRequest, RequestError
from deltaserve.server.model.base_model import BaseModel


class Admission:
    """held_fingerprint: of the base as it is held, part of every cache key. failed: sequences that
    could not begin, and why, until somebody takes them."""

    def __init__(
        self,
        model: BaseModel,
        adapters: AdapterCache,
        limits: Limits,
        held_fingerprint: str,
        blocks: BlockManager,
        clock: Callable[[], float],
    ) -> None:
        self.failed: list[tuple[Sequence, RequestError]] = []
        self._model = model
        self._adapters = adapters
        self._limits = limits
        self._held_fingerprint = held_fingerprint
        self._blocks = blocks
        self._clock = clock
        self._patches: tuple[AdapterRef, ...] = ()

    def set_patches(self, patches: Iterable[AdapterRef]) -> None:
        """As `Engine.set_patches`."""
        found = tuple(patches)
        held = self._adapters.acquire(found)
        try:
            self._check_mix(held, found)
            for residency in held:
                if residency.own_text is not None:
                    raise InvalidRequest(
                        f"adapters: {residency.name!r} brings a tokenizer or chat template of its "
                        "own, which cannot be part of every request",
                        field="adapters",
                    )
        finally:
            self._adapters.release(held, running=False)
        self._patches = found

    def patched(self, request: Request) -> Request:
        """The request with the server's own patches before its adapters, of each member."""
        if not self._patches:
            return request
        combination = request.combination
        if combination is None:
            return replace(request, adapters=self._with_patches(request.adapters))
        patched = []
        for i, member in enumerate(combination.members):
            with located(i, request):
                adapters = self._with_patches(member.adapters)
            patched.append(replace(member, adapters=adapters))
        return replace(request, combination=replace(combination, members=tuple(patched)))

    def _with_patches(self, adapters: tuple[AdapterRef, ...]) -> tuple[AdapterRef, ...]:
        own = {patch.name for patch in self._patches}
        for ref in adapters:
            if ref.name.partition("@")[0] in own:
                raise InvalidRequest(
                    f"adapters: {ref.name!r} is part of every request to this server; leave it out",
                    field="adapters",
                )
        return (*self._patches, *adapters)

    def begin(self, sequence: Sequence) -> bool:
        """The scheduler wants to admit it: its adapters are resident. False if it fails; it is in
        `failed` then."""
        members = sequence.members
        try:
            for i, member in enumerate(members):
                with located(i, sequence.request):
                    self._lay_out(member)
            lengths = [(len(m.request.prompt_ids), m.virtual) for m in members]
            if sequence.group is not None:
                check_together(lengths, sequence.request.sampling.max_tokens, self._limits)
                size = self._blocks.block_size
                blocks = sum(-(-m.most // size) for m in members)
                self._adapters.check_beside(sequence.held, self._blocks.memory_of(blocks))
        except RequestError as error:
            self.failed.append((sequence, error))
            return False
        return True

    def withdraw(self, sequence: Sequence) -> None:
        """It has begun but finds no room: its adapters may go until it begins again."""
        for member in sequence.members:
            if member.admitted:
                self._adapters.withdrawn(member.adapters, member.chosen)
                member.admitted = False

    def _lay_out(self, sequence: Sequence) -> None:
        held, request = sequence.adapters, sequence.request
        if held and not sequence.admitted:
            sequence.chosen = self._check_mix(held, request.adapters)
        prefix = next((a.prefix for a in held if a.prefix is not None), None)
        virtual = len(prefix) if prefix is not None else 0
        check_length(len(request.prompt_ids), virtual, request.sampling.max_tokens, self._limits)
        if not sequence.admitted:
            sequence.admitted = True
            sequence.slots = self._adapters.admitted(held, sequence.chosen)
        active = [_active(sequence, i, virtual) for i in range(len(held))]
        root, turns = cache_keys(
            active, self._blocks.block_size, self._held_fingerprint, request.salt
        )
        sequence.adapter_ready = sequence.adapter_ready or self._clock()
        sequence.begin(prefix, spans(active), root, turns)
        most = len(request.prompt_ids) + virtual + request.sampling.max_tokens
        sequence.most = min(most, self._limits.max_length)

    def _check_mix(
        self, held: tuple[Residency, ...], refs: tuple[AdapterRef, ...]
    ) -> tuple[Chosen, ...]:
        """The modules that each adapter acts on. InvalidRequest for what cannot be combined."""
        chosen, weighted = [], []
        for residency, ref in zip(held, refs, strict=True):
            assert residency.structure is not None
            chosen.append(choose(residency.structure, residency.name, ref.modules))
            weighted.append((masked(residency.structure, chosen[-1]), ref.strength))
        reason = self._model.composable(weighted)
        if reason is not None:
            patches = ", ".join(repr(p.name) for p in self._patches)
            own = f" ({patches} is part of every request to this server)" if patches else ""
            raise InvalidRequest(f"adapters: {reason}{own}", field="adapters")
        return tuple(chosen)


def _active(sequence: Sequence, i: int, virtual: int) -> Active:
    """From where on the request's adapter i acts. virtual: tokens before the prompt."""
    request, residency = sequence.request, sequence.adapters[i]
    structure, start = residency.structure, 0
    if structure is not None and structure.invocation:
        start = invoked_at(request.prompt_ids, structure.invocation)
        start += virtual if start < NEVER else 0
    strength = float(request.adapters[i].strength)
    key = (residency.digest, repr(strength), "\0".join(sequence.chosen[i]))
    return Active(sequence.slots[i], strength, key, start)
