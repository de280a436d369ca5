"""What becomes of adapters on this base: they are put on the modules that they act on."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from deltaserve.server.model.embedding import DeltaEmbedding
from deltaserve.server.model.linear import LinearGroup
from deltaserve.server.model.norm import DeltaNorm
from deltaserve.server.packing.packer import Linears
from deltaserve.server.packing.prepared import PreparedAdapter


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
        """Slots whose adapters act on the embedding, of which something is launched for them."""

    @property
    def linears(self) -> tuple[Linears, ...]:
        """The groups as packing knows them."""
        return tuple(
            Linears(g.names, None if g.deltas is None else g.deltas.group)
            for g in self.groups.values()
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
            if not self.embedding.deltas.by_token:
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
