"""One decoder layer of Llama's form, in a few native calls between its linears."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltaserve.kernels.attention.step import How
from deltaserve.kernels.layer import add_norm, rotate_write, silu_mul
from deltaserve.server.model.attention import attend
from deltaserve.server.model.context import ForwardContext
from deltaserve.server.model.linear import LinearGroup
from deltaserve.server.model.norm import DeltaNorm
from deltaserve.server.model.probe import LayerAttention


class FusedLayer:
    """norms: before attention, before the MLP. linears: q k v, o, gate up, down."""

    def __init__(
        self,
        ctx: ForwardContext,
        attention: LayerAttention,
        norms: tuple[DeltaNorm, DeltaNorm],
        linears: tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup],
    ) -> None:
        self.ctx = ctx
        self.layer_idx = attention.layer_idx
        self.heads, self.kv_heads = attention.q_heads, attention.kv_heads
        self.dim = attention.key_dim
        self.how = How(attention.scale, attention.window, attention.softcap, None)
        self.first, self.second = norms
        self.qkv, self.o, self.up, self.down = linears

    def __call__(
        self,
        x: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **__: Any,
    ) -> Tensor:
        """x: [1, T, hidden] -> the same; arguments as the modeling code gives them to the layer."""
        assert position_embeddings is not None
        mixed = self.o(self._attend(self.qkv(self.first(x)), *position_embeddings))
        residual = x.view(mixed.shape)
        if self.second.slots:
            mixed.add_(residual)
            normed = self.second(mixed.unsqueeze(0))
        else:
            normed = add_norm(mixed, residual, self.second.gain, self.second.eps)
        return self.down(silu_mul(self.up(normed))).add_(mixed).view(x.shape)

    def _attend(self, qkv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """[T, q k v] -> [T, heads * dim]."""
        ctx, heads, kv_heads = self.ctx, self.heads, self.kv_heads
        step, kv, layer = ctx.attention, ctx.kv, self.layer_idx
        assert step is not None and kv is not None
        keys, values = kv.keys[layer], kv.values[layer]
        cosine, sine = cosine[0], sine[0]
        rotate_write(qkv, heads, cosine, sine, keys, values, step.cells)
        parts = qkv.view(1, len(qkv), -1, self.dim).transpose(1, 2)
        query, key, value = parts.split_with_sizes([heads, kv_heads, kv_heads], 1)
        return attend(query, key, value, ctx, layer, self.how).view(len(qkv), -1)
