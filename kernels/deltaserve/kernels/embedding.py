"""EmbeddingDeltas: what a step's adapters do to the token embedding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.primitives import LowRank, Primitive, Replace, ReplaceRows, SparseCols
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import unique_bytes


@dataclass(frozen=True, eq=False, slots=True)
class Low:
    """a: [vocabulary, r], b: [hidden, r]: a token's row of a, times b."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """values: [n, hidden] of the tokens index [n], ascending; index None: of every token."""

    index: Tensor | None
    values: Tensor

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(positions in ids that have a row [m], their rows [m, hidden])."""
        if self.index is None:
            return torch.arange(len(ids), device=ids.device), self.values[ids]
        place = torch.searchsorted(self.index, ids).clamp_(max=len(self.index) - 1)
        found = (self.index[place] == ids).nonzero().squeeze(1)
        return found, self.values[place[found]]


@dataclass(frozen=True, eq=False, slots=True)
class PreparedEmbedding:
    """One adapter's primitives on the embedding, ready to be installed."""

    low: tuple[Low, ...] = ()
    added: tuple[Rows, ...] = ()
    replaced: tuple[Rows, ...] = field(default=())

    def tensors(self) -> tuple[Tensor, ...]:
        found = [t for low in self.low for t in (low.a, low.b)]
        for rows in (*self.added, *self.replaced):
            found += [rows.values] if rows.index is None else [rows.index, rows.values]
        return tuple(found)

    @property
    def nbytes(self) -> int:
        return unique_bytes(self.tensors())


def prepare(
    primitives: tuple[Primitive, ...], vocabulary: int, hidden: int, dtype: torch.dtype
) -> PreparedEmbedding:
    """What an adapter has on the embedding, in host memory. vocabulary, hidden: of the embedding's
    weight; dtype: of its output. Any thread. Raises ValueError for other primitives than LowRank,
    SparseCols (columns are tokens), one Replace or one ReplaceRows, or of the wrong shape."""
    low: list[Low] = []
    added: list[Rows] = []
    replaced: list[Rows] = []
    for p in primitives:
        match p:
            case LowRank(a, b, scale):
                _shape("LowRank.a", a, (a.shape[0], vocabulary))
                _shape("LowRank.b", b, (hidden, a.shape[0]))
                low.append(Low(cast(a, dtype, transpose=True), cast(b, dtype), float(scale)))
            case SparseCols(index, values):
                _shape("SparseCols.values", values, (hidden, len(index)))
                added.append(_rows("SparseCols.index", index, values.T, vocabulary, dtype))
            case Replace(weight):
                _shape("Replace.weight", weight, (vocabulary, hidden))
                replaced.append(Rows(None, cast(weight, dtype)))
            case ReplaceRows(index, values):
                _shape("ReplaceRows.values", values, (len(index), hidden))
                replaced.append(_rows("ReplaceRows.index", index, values, vocabulary, dtype))
            case _:
                raise ValueError(
                    f"{type(p).__name__} on an embedding: it takes LowRank, SparseCols, "
                    "Replace and ReplaceRows"
                )
    if len(replaced) > 1:
        raise ValueError("more than one Replace or ReplaceRows on the embedding")
    added, replaced = ([rows for rows in some if len(rows.values)] for some in (added, replaced))
    return PreparedEmbedding(tuple(low), tuple(added), tuple(replaced))


def _rows(name: str, index: Tensor, values: Tensor, vocabulary: int, dtype: torch.dtype) -> Rows:
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < vocabulary:
        raise ValueError(f"{name} has tokens outside 0..{vocabulary - 1}")
    order = index.argsort()
    return Rows(index[order].contiguous(), values[order].to(dtype).contiguous())


def _shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the embedding needs {expected}")


class EmbeddingDeltas:
    """vocabulary, hidden: of the embedding's weight; dtype: of y. by_token: whether steps launch
    the same whatever its adapters are."""

    by_token = False

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
        self.vocabulary = vocabulary
        self.hidden = hidden
        self.dtype = dtype
        self._prepared: dict[int, PreparedEmbedding] = {}

    def prepare(self, primitives: tuple[Primitive, ...]) -> PreparedEmbedding:
        """See `prepare`."""
        return prepare(primitives, self.vocabulary, self.hidden, self.dtype)

    def install(self, slot: int, prepared: PreparedEmbedding) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread."""
        self._prepared[slot] = prepared

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        self._prepared.pop(slot, None)

    @property
    def nbytes(self) -> int:
        """Exact bytes installed, memory shared between slots counted once."""
        return unique_bytes([t for p in self._prepared.values() for t in p.tensors()])

    def forward(
        self,
        ids: Tensor,
        y: Tensor,
        weight: Tensor,
        segments: Segments,
        multiplier: float = 1.0,
    ) -> Tensor:
        """ids: int64 [T]; y: the base's output [T, hidden], which is changed in place and returned.

        weight: the base's [vocabulary, hidden], not multiplied.
        multiplier: the embedding module's own factor (Gemma's), by which rows and deltas are
        multiplied too. A mix gives ``y + sum of w (y_a - y)``; one adapter that replaces a row, at
        strength 1, gives exactly that row.
        """
        if segments.slots.isdisjoint(self._prepared):
            return y
        for start, end, mix in segments.runs:
            present = [(self._prepared[s], w) for s, w in mix if s in self._prepared]
            if present:
                run = ids[start:end]
                y[start:end] = self._run(run, y[start:end], present, weight, multiplier)
        return y

    def _run(
        self,
        ids: Tensor,
        y: Tensor,
        present: list[tuple[PreparedEmbedding, float]],
        weight: Tensor,
        multiplier: float,
    ) -> Tensor:
        total = y.to(torch.float32, copy=True)
        replacing = [(rows, w) for p, w in present for rows in p.replaced]
        for rows, strength in replacing:
            where, values = rows.lookup(ids)
            if len(replacing) == 1 and strength == 1:
                total[where] = values.float() * multiplier
            else:
                change = values.float() - weight[ids[where]].float()
                total[where] += change * (strength * multiplier)
        for prepared, strength in present:
            factor = strength * multiplier
            for low in prepared.low:
                h = F.embedding(ids, low.a).float()
                total.add_(h @ low.b.float().T, alpha=low.scale * factor)
            for rows in prepared.added:
                where, values = rows.lookup(ids)
                total[where] += values.float() * factor
        return total.to(y.dtype)
