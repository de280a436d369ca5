"""One decoder layer of Llama's form, run by a backend in launches of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.kernels.decoder import DecoderLayer
from deltaserve.server.model.context import ForwardContext
from deltaserve.server.model.probe import LayerAttention


def fused_layers(model: nn.Module) -> list[FusedGpuLayer]:
    """Those of a model that run so."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return [forward for forward in forwards if isinstance(forward, FusedGpuLayer)]


class FusedGpuLayer:
    """layer: as the backend runs it. turned: elements of a head that positions turn, known once the
    model has run."""

    def __init__(self, ctx: ForwardContext, attention: LayerAttention, layer: DecoderLayer) -> None:
        self.ctx = ctx
        self.layer_idx = attention.layer_idx
        self.scale = attention.scale
        self.dim = attention.key_dim
        self.layer = layer
        self.turned = 0

    def __call__(
        self,
        x: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **__: Any,
    ) -> Tensor:
        """x: [1, T, hidden] -> the same; arguments as the modeling code gives them to the layer."""
        assert position_embeddings is not None
        ctx = self.ctx
        step, kv = ctx.attention, ctx.kv
        assert step is not None and kv is not None
        cosine, sine = (r[0].contiguous() for r in position_embeddings)
        self.turned = cosine.shape[-1]
        y = self.layer.run(
            x[0].contiguous(),
            (cosine, sine),
            (kv.keys[self.layer_idx], kv.values[self.layer_idx]),
            step,
            ctx.segments,
            self._gated if ctx.gated_prefixes.acts(ctx.segments) else None,
        )
        return y.unsqueeze(0)

    def _gated(self, out: Tensor, query: Tensor) -> Tensor:
        """Adds what adapters attend to beside the sequence; returns their rows."""
        ctx = self.ctx
        ctx.gated_prefixes.add(out, query, self.layer_idx, ctx.segments, self.scale)
        return torch.tensor(ctx.gated_prefixes.rows(ctx.segments), device=out.device)
