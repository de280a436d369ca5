"""PreparedAdapter: an adapter's primitives, packed for the modules they act on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

from torch import Tensor

from deltaserve.kernels.backend import Prepared, PreparedDeltas
from deltaserve.kernels.norm import PreparedNorm
from deltaserve.kernels.primitives import Prefix, tensors
from deltaserve.kernels.table import places


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """Ready to be installed in a slot. linears: by the group's first module. norms: by module.
    prefix: what takes a place in the sequence, in the dtype it is served in. gated: what does not.
    """

    digest: str
    linears: Mapping[str, PreparedDeltas]
    norms: Mapping[str, PreparedNorm]
    embedding: Prepared | None
    prefix: Prefix | None
    gated: Prepared | None

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
        for own in (self.embedding, self.gated):
            held += own.tensors() if own is not None else ()
        return held + list(tensors(self.prefix) if self.prefix is not None else ())
