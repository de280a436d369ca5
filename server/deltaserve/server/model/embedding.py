"""The input embedding: the base's rows, the adapters' changes, and virtual tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaserve.server.model.context import ForwardContext


class DeltaEmbedding(nn.Module):
    """Stands where the input embedding stood. multiplier: the embedding's own factor (Gemma), or
    None if its output is more than a factor times its rows, and then it takes no adapters."""

    def __init__(self, inner: nn.Module, ctx: ForwardContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.ctx = ctx
        self.multiplier = multiplier(inner)
        weight: Any = inner.weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.deltas = ctx.backend.embedding_deltas(self.num_embeddings, self.embedding_dim, dtype)

    @property
    def weight(self) -> Tensor:
        weight: Any = self.inner.weight
        found: Tensor = weight
        return found

    def forward(self, ids: Tensor) -> Tensor:
        """ids [1, T] -> [1, T, hidden]."""
        y: Tensor = self.inner(ids)
        segments, override = self.ctx.segments, self.ctx.embedding_override
        if segments and self.multiplier is not None:
            flat = y.view(-1, y.shape[-1])
            y = self.deltas.forward(
                ids.view(-1), flat, self.weight, segments, self.multiplier
            ).view_as(y)
        if override is not None:
            rows, values = override
            y = y.index_copy(1, rows, values.to(y.dtype).unsqueeze(0))
        return y


@torch.no_grad()
def multiplier(inner: nn.Module) -> float | None:
    """The factor between the module's output and its weight's rows; None if it is not one."""
    weight: Any = inner.weight
    ids = torch.arange(min(8, weight.shape[0]), device=weight.device)
    rows, y = F.embedding(ids, weight).double(), inner(ids[None])[0].double()
    if y.shape != rows.shape:
        return None
    norm = (rows * rows).sum()
    if norm == 0:
        return 1.0 if torch.equal(y, rows) else None
    factor = float((rows * y).sum() / norm)
    if torch.equal(y, rows):
        return 1.0
    tolerance = 1e-5 if weight.dtype == torch.float32 else 1e-2
    close = torch.allclose(y, rows * factor, rtol=tolerance, atol=tolerance * float(y.abs().max()))
    if not close:
        return None
    stated = getattr(inner, "embed_scale", None)
    if stated is not None and abs(float(stated) / factor - 1) < tolerance:
        return float(stated)
    return factor
