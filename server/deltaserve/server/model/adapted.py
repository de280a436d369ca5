"""What becomes of an adapter on this base: its primitives prepared for the modules they act on."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import UnsupportedAdapter
from deltaserve.kernels.backend import PreparedDeltas
from deltaserve.kernels.embedding import PreparedEmbedding
from deltaserve.kernels.norm import PreparedNorm
from deltaserve.kernels.primitives import AnyPrefix, GatedPrefix, Prefix, Primitive, tensors
from deltaserve.kernels.table import places
from deltaserve.server.model.embedding import DeltaEmbedding
from deltaserve.server.model.linear import LinearGroup
from deltaserve.server.model.norm import DeltaNorm


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """Ready to be installed in a slot. linears: by the group's first module. norms: by module.
    prefix, gated: in the dtype they are served in; prefix: what takes a place in the sequence."""

    digest: str
    linears: Mapping[str, PreparedDeltas]
    norms: Mapping[str, PreparedNorm]
    embedding: PreparedEmbedding | None
    prefix: Prefix | None
    gated: GatedPrefix | None

    def __getstate__(self) -> dict[str, object]:
        """`memory` tells tensors by where they are: another process has them elsewhere."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def nbytes(self) -> int:
        """Bytes it takes while installed; a tensor that its modules share is counted once. What it
        shares with other adapters is counted for each of them: any of them may be the last."""
        return sum(self.memory.values())

    @cached_property
    def memory(self) -> Mapping[Hashable, int]:
        """Bytes of each of its tensors, by what tells tensors of other adapters from it."""
        return places(self.tensors())

    def tensors(self) -> list[Tensor]:
        """All that it keeps; one that its modules share may be there several times."""
        held = [t for linear in self.linears.values() for t in linear.tensors()]
        held += [t for norm in self.norms.values() for t in norm.tensors()]
        if self.embedding is not None:
            held += self.embedding.tensors()
        for prefix in (self.prefix, self.gated):
            held += tensors(prefix) if prefix is not None else ()
        return held


class Modules:
    """The replaced modules of one model, and adapters on them.

    groups: all linears. experts: paths of fused experts, which take no adapters.
    """

    def __init__(
        self,
        groups: tuple[LinearGroup, ...],
        embedding: tuple[str, DeltaEmbedding],
        norms: Mapping[str, DeltaNorm],
        experts: tuple[str, ...],
    ) -> None:
        self.groups = {group.names[0]: group for group in groups}
        self.group_of = {name: group for group in groups for name in group.names}
        self.embedding_name, self.embedding = embedding
        self.norms = norms
        self.experts = experts
        self._installed: dict[int, PreparedAdapter] = {}
        self.not_native: set[int] = set()
        """Slots whose adapters do to the linears what no native call does."""
        self.by_row: set[int] = set()
        """Slots whose adapters act on norms or the embedding."""

    def prepare(self, adapter: Adapter, prefix: AnyPrefix | None) -> PreparedAdapter:
        """Casts and packs; any thread. Raises UnsupportedAdapter for what a module cannot take."""
        linears: dict[str, dict[int, tuple[Primitive, ...]]] = {}
        norms: dict[str, PreparedNorm] = {}
        embedding: PreparedEmbedding | None = None
        for name, primitives in adapter.modules.items():
            self._check(name)
            if not primitives:
                continue
            try:
                if name == self.embedding_name:
                    embedding = self.embedding.deltas.prepare(primitives)
                elif name in self.norms:
                    norms[name] = self.norms[name].deltas.prepare(primitives)
                else:
                    group = self.group_of[name]
                    part = linears.setdefault(group.names[0], {})
                    part[group.names.index(name)] = primitives
            except (TypeError, ValueError) as error:
                raise UnsupportedAdapter(f"{name}: {error}", field=name) from error
        return PreparedAdapter(
            digest=adapter.digest,
            linears={lead: self._prepare_group(lead, parts) for lead, parts in linears.items()},
            norms=norms,
            embedding=embedding,
            prefix=None if isinstance(prefix, GatedPrefix) else prefix,
            gated=prefix if isinstance(prefix, GatedPrefix) else None,
        )

    def only(self, prepared: PreparedAdapter, modules: Collection[str]) -> PreparedAdapter:
        """Its part on some of its modules, without virtual tokens, over the same tensors."""
        linears = {}
        for lead, linear in prepared.linears.items():
            parts = {i for i, name in enumerate(self.groups[lead].names) if name in modules}
            if parts:
                linears[lead] = linear.only(parts)
        return PreparedAdapter(
            digest=prepared.digest,
            linears=linears,
            norms={name: norm for name, norm in prepared.norms.items() if name in modules},
            embedding=prepared.embedding if self.embedding_name in modules else None,
            prefix=None,
            gated=None,
        )

    def install(self, slot: int, prepared: PreparedAdapter) -> None:
        """Engine thread. The slot must be free."""
        assert slot not in self._installed, f"slot {slot} is taken"
        for lead, linear in prepared.linears.items():
            deltas = self.groups[lead].deltas
            assert deltas is not None
            deltas.install(slot, linear)
            if not deltas.is_native(slot):
                self.not_native.add(slot)
        for name, norm in prepared.norms.items():
            self.norms[name].install(slot, norm)
        if prepared.embedding is not None:
            self.embedding.deltas.install(slot, prepared.embedding)
        if prepared.norms or prepared.embedding is not None:
            self.by_row.add(slot)
        self._installed[slot] = prepared

    def remove(self, slot: int) -> None:
        """Engine thread. Frees what `install` took."""
        prepared = self._installed.pop(slot)
        self.not_native.discard(slot)
        self.by_row.discard(slot)
        for lead in prepared.linears:
            deltas = self.groups[lead].deltas
            assert deltas is not None
            deltas.remove(slot)
        for name in prepared.norms:
            self.norms[name].remove(slot)
        if prepared.embedding is not None:
            self.embedding.deltas.remove(slot)

    def _prepare_group(
        self, lead: str, parts: Mapping[int, tuple[Primitive, ...]]
    ) -> PreparedDeltas:
        group = self.groups[lead]
        assert group.deltas is not None
        try:
            return group.deltas.prepare(parts)
        except (TypeError, ValueError) as error:
            names = ", ".join(group.names[i] for i in sorted(parts))
            raise UnsupportedAdapter(f"{names}: {error}", field=names) from error

    def _check(self, name: str) -> None:
        """Raises UnsupportedAdapter if no adapter can act on the module."""
        reason = self.refusal(name)
        if reason:
            raise UnsupportedAdapter(f"{name}: {reason}", field=name)

    def refusal(self, name: str) -> str:
        """Why no adapter can act on the module; empty if one can."""
        for path in self.experts:
            if name == path or name.startswith(f"{path}."):
                return "fused experts take no adapters"
        if name == self.embedding_name:
            exact = self.embedding.multiplier is not None
            return "" if exact else "this kind of embedding takes no adapters"
        if name in self.norms:
            by_token = self.norms[name].token_dim is not None
        elif name in self.group_of:
            by_token = self.group_of[name].deltas is not None
        else:
            return "the base has no such linear, embedding or norm, or never calls it"
        return "" if by_token else "its inputs are not one row per token, so it takes no adapters"
