"""What a decoder layer of Llama's form is made of, for backends that run one in launches of their
own:

    h = x + o(attend(rope(qkv(norm(x)))));  y = h + down(silu(gate) * up),  [gate, up] = up(norm(h))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from deltaserve.kernels.attention.step import AttentionStep, How
from deltaserve.kernels.base import BaseLinear
from deltaserve.kernels.norm import NormDeltas
from deltaserve.kernels.segments import Segments

Beside: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Changes a layer's attention output [T, heads, dim] in place, given the queries as attention sees
them [heads, T, dim]; returns the rows changed, int64."""


@dataclass(frozen=True, eq=False, slots=True)
class Norm:
    """``x / sqrt(mean(x^2) + eps) * (offset + gain)``; deltas: of the gain."""

    gain: Tensor
    eps: float
    offset: float
    deltas: NormDeltas


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """deltas: the backend's own."""

    deltas: Any
    base: BaseLinear


@dataclass(frozen=True, eq=False, slots=True)
class LayerParts:
    """norms: before attention, before the MLP. linears: q k v, o, gate up, down. dim: of a head.
    head_norms: of each head's query and key before they are turned."""

    norms: tuple[Norm, Norm]
    linears: tuple[Linear, Linear, Linear, Linear]
    heads: int
    kv_heads: int
    dim: int
    how: How
    head_norms: tuple[Norm, Norm] | None = None


class DecoderLayer(Protocol):
    """A layer as a backend runs it."""

    def run(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        step: AttentionStep,
        segments: Segments,
        beside: Beside | None = None,
    ) -> Tensor:
        """x: [T, hidden], left as it is; returns the same shape. rotation: cosine and sine [T,
        turned]. cache: the layer's keys and values, as the backend's steps take them."""
        ...
