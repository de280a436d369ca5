"""Paged attention as transformers' modeling code calls it: write the step's keys and values to the
cache, then let every token attend to its own sequence, and to a gated prefix if its adapter has
one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from deltaserve.kernels.attention.step import How
from deltaserve.server.model.context import ForwardContext

ATTENTION = "deltaserve"
"""The name under which the function is registered with transformers."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv] -> [1, T, H, Dv].

    sliding_window: a token sees itself and the window - 1 tokens before it. softcap: logits become
    ``softcap * tanh(logits / softcap)``. s_aux: one attention sink logit per head [H].
    """
    ctx: ForwardContext = module.ctx  # type: ignore[assignment]
    step, kv = ctx.attention, ctx.kv
    assert step is not None and kv is not None
    layer: int = module.layer_idx  # type: ignore[assignment]
    step.write(kv.keys[layer], kv.values[layer], key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = How(scale, sliding_window, softcap, s_aux)
    return attend(query, key, value, ctx, layer, how).unsqueeze(0), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext, layer: int, how: How
) -> Tensor:
    """Attention of the step's tokens, whose keys and values are in the cache already. Shapes as
    `paged_attention` takes them; returns [T, H, Dv]."""
    step, kv = ctx.attention, ctx.kv
    assert step is not None and kv is not None
    out = step.attend(query, key, value, kv.keys[layer], kv.values[layer], how)
    if ctx.gated_prefixes.slots:
        ctx.gated_prefixes.add(out, query[0], layer, ctx.segments, how.scale)
    return out


AttentionInterface.register(ATTENTION, paged_attention)
