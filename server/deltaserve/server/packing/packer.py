"""Packer: what packing an adapter must know of a base, of which no weight is needed for it.

It can be given to another process, which packs the same bytes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import UnsupportedAdapter
from deltaserve.kernels.backend import (
    Pack,
    PackEmbedding,
    PackNorm,
    PackPrefix,
    Prepared,
    PreparedDeltas,
)
from deltaserve.kernels.norm import PreparedNorm
from deltaserve.kernels.primitives import GatedPrefix, Primitive
from deltaserve.kernels.table import Group
from deltaserve.server.packing import prefix
from deltaserve.server.packing.prefix import Layer
from deltaserve.server.packing.prepared import PreparedAdapter


@dataclass(frozen=True, slots=True)
class Linears:
    """Linears that share their input. group: None if its rows are not the step's tokens."""

    names: tuple[str, ...]
    group: Group | None


@dataclass(frozen=True)
class Packer:
    """linears: all of the base. norms: path -> size of the gain, None where the rows are not the
    step's tokens. embedding: its path, vocabulary and size; exact: it is one that takes
    adapters. experts: paths of fused ones. layers: per attention layer, in order. hidden, dtype: of
    activations. pack, pack_norm, pack_embedding, pack_prefix: the backend's."""

    linears: tuple[Linears, ...]
    norms: Mapping[str, int | None]
    embedding: tuple[str, int, int]
    exact: bool
    experts: tuple[str, ...]
    layers: tuple[Layer, ...]
    hidden: int
    dtype: torch.dtype
    pack: Pack
    pack_norm: PackNorm
    pack_embedding: PackEmbedding
    pack_prefix: PackPrefix

    @cached_property
    def _places(self) -> dict[str, tuple[Linears, int]]:
        """Module -> its linears, and which of them it is."""
        return {name: (of, i) for of in self.linears for i, name in enumerate(of.names)}

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """Casts and packs; heavy, any thread. Raises UnsupportedAdapter for what a module cannot
        take, InvalidAdapter for a prefix of other shapes."""
        path, vocabulary, size = self.embedding
        fitted = prefix.fit(adapter.prefix, self.layers, self.hidden, self.dtype)
        linears: dict[str, dict[int, tuple[Primitive, ...]]] = {}
        norms: dict[str, PreparedNorm] = {}
        embedding: Prepared | None = None
        for name, primitives in adapter.modules.items():
            reason = self.refusal(name)
            if reason:
                raise UnsupportedAdapter(f"{name}: {reason}", field=name)
            if not primitives:
                continue
            try:
                if name == path:
                    embedding = self.pack_embedding(primitives, vocabulary, size, self.dtype)
                elif (gain := self.norms.get(name)) is not None:
                    norms[name] = self.pack_norm(primitives, gain)
                else:
                    of, i = self._places[name]
                    linears.setdefault(of.names[0], {})[i] = primitives
            except (TypeError, ValueError) as error:
                raise UnsupportedAdapter(f"{name}: {error}", field=name) from error
        return PreparedAdapter(
            digest=adapter.digest,
            linears={lead: self._packed(lead, parts) for lead, parts in linears.items()},
            norms=norms,
            embedding=embedding,
            prefix=None if isinstance(fitted, GatedPrefix) else fitted,
            gated=self.pack_prefix(fitted) if isinstance(fitted, GatedPrefix) else None,
        )

    def refusal(self, name: str) -> str:
        """Why no adapter can act on the module; empty if one can."""
        for path in self.experts:
            if name == path or name.startswith(f"{path}."):
                return "fused experts take no adapters"
        if name == self.embedding[0]:
            return "" if self.exact else "this kind of embedding takes no adapters"
        if name in self.norms:
            by_token = self.norms[name] is not None
        elif name in self._places:
            by_token = self._places[name][0].group is not None
        else:
            return "the base has no such linear, embedding or norm, or never calls it"
        return "" if by_token else "its inputs are not one row per token, so it takes no adapters"

    def _packed(self, lead: str, parts: Mapping[int, tuple[Primitive, ...]]) -> PreparedDeltas:
        of, _ = self._places[lead]
        assert of.group is not None
        try:
            return self.pack(parts, of.group)
        except (TypeError, ValueError) as error:
            names = ", ".join(of.names[i] for i in sorted(parts))
            raise UnsupportedAdapter(f"{names}: {error}", field=names) from error
