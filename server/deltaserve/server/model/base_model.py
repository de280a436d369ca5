"""BaseModel: the one copy of the base that all adapters share, ready to run steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.base import BaseSpec
from deltaserve.kernels.check import composable
from deltaserve.kernels.primitives import GatedPrefix
from deltaserve.server.model.adapted import Modules
from deltaserve.server.model.context import ForwardContext
from deltaserve.server.model.probe import LayerAttention
from deltaserve.server.packing.packer import Packer
from deltaserve.server.packing.prefix import Layer
from deltaserve.server.packing.prepared import PreparedAdapter


@dataclass(eq=False)
class BaseModel:
    """An unmodified transformers model with its linears, norms, input embedding and attention
    replaced by ones that read `ctx`.

    attention: per layer, in order. max_length: tokens of one sequence, virtual ones included.
    generation: the checkpoint's own sampling defaults (generation_config.json). folder: where the
    checkpoint and its tokenizer are. nbytes: held by the base, adapters not included.
    """

    spec: BaseSpec
    attention: tuple[LayerAttention, ...]
    max_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    generation: Mapping[str, Any]
    folder: Path
    dtype: torch.dtype
    ctx: ForwardContext
    nbytes: int
    model: nn.Module
    modules: Modules

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        into: Tensor | None = None,
    ) -> Tensor:
        """One step; `ctx` must have been filled for it.

        input_ids, positions: int64 [T]. logit_rows: int64 [n], rows whose logits are wanted.
        Returns float32 [n, vocabulary], in `into` if that is given.
        """
        out = self.model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=logit_rows,
        )
        logits: Tensor = out.logits
        return logits[0].float() if into is None else into.copy_(logits[0])

    @property
    def by_row(self) -> Collection[int]:
        """Slots of adapters of which something is computed for the rows that they act on alone:
        what such a step launches depends on its adapters. Of norms, the backend knows which."""
        return self.modules.by_row.union(self.ctx.gated_prefixes.slots)

    @cached_property
    def packer(self) -> Packer:
        """What packing an adapter must know of it."""
        modules = self.modules
        embedding = modules.embedding
        return Packer(
            linears=modules.linears,
            norms={
                name: norm.deltas.hidden if norm.token_dim is not None else None
                for name, norm in modules.norms.items()
            },
            embedding=(
                modules.embedding_name, embedding.num_embeddings, embedding.embedding_dim,
            ),
            exact=embedding.multiplier is not None,
            experts=modules.experts,
            layers=tuple(
                Layer(a.layer_idx, a.kv_heads, a.key_dim, a.value_dim) for a in self.attention
            ),
            hidden=self.spec.hidden_size,
            dtype=self.dtype,
            pack=self.ctx.backend.packed,
            pack_norm=self.ctx.backend.packed_norm,
            pack_embedding=self.ctx.backend.packed_embedding,
            pack_prefix=self.ctx.backend.packed_prefix,
        )  # fmt: skip

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """As `Packer.prepare`."""
        return self.packer.prepare(adapter)

    def only(self, prepared: PreparedAdapter, modules: Collection[str]) -> PreparedAdapter:
        """Its part on some of its modules, over the same tensors."""
        return self.modules.only(prepared, modules)

    def install(self, slot: int, prepared: PreparedAdapter) -> None:
        """Engine thread, between steps. slot: >= 1 and free."""
        self.modules.install(slot, prepared)
        if prepared.gated is not None:
            self.ctx.gated_prefixes.install(slot, prepared.gated)

    def remove(self, slot: int) -> None:
        """Engine thread, between steps. Frees what `install` took."""
        self.modules.remove(slot)
        self.ctx.gated_prefixes.remove(slot)

    def composable(self, adapters: Sequence[tuple[Adapter, float]]) -> str | None:
        """Why the weighted list cannot be served as one; None if it can."""
        prefixed = [(a, w) for a, w in adapters if not isinstance(a.prefix, GatedPrefix | None)]
        if len(prefixed) > 1:
            return f"{len(prefixed)} adapters have virtual tokens; at most one can"
        if prefixed and prefixed[0][1] != 1.0:
            return f"an adapter with virtual tokens has strength {prefixed[0][1]}; it must be 1"
        names = {name for adapter, _ in adapters for name in adapter.modules}
        for name in sorted(names):
            parts = [(a.modules[name], w) for a, w in adapters if name in a.modules]
            reason = composable(parts)
            if reason is not None:
                return f"{name}: {reason}"
        return None
