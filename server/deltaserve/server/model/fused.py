"""Decoder layers of Llama's form in a few native calls, where that is proven to be the same.

A layer of the modeling code is some forty small torch operations, which on a CPU cost more than
the weights' bytes of a small model. Between its linears, which keep their adapters, the same is
done by three native kernels:

    h = x + o(attend(rope(qkv(norm(x)))));  y = h + down(silu(gate) * up),  [gate, up] = up(norm(h))

Which layers are of this form is decided by numbers, as with norms: each layer is run both ways, on
what the model gives it and on random inputs of several magnitudes. Others stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.kernels.layer import add_norm, rotate_write, silu_mul
from deltaserve.kernels.native import library
from deltaserve.server.model.adapted import Modules
from deltaserve.server.model.attention import How, attend
from deltaserve.server.model.context import AttentionStep, ForwardContext, KVStore, PrefillChunk
from deltaserve.server.model.linear import LinearGroup
from deltaserve.server.model.norm import DeltaNorm
from deltaserve.server.model.probe import ArchReport, LayerAttention

logger = logging.getLogger(__name__)

MAGNITUDES = (0.03, 1.0, 20.0)
TOKENS = 5
# Of what the layer adds, in the 2-norm. bfloat16 rounds once here and several times there.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


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


def fuse(
    model: nn.Module,
    report: ArchReport,
    modules: Modules,
    ctx: ForwardContext,
    dtype: torch.dtype,
) -> int:
    """Lets every layer that is proven to be of the form run fused; returns how many. `ctx` must
    not be in use."""
    if library() is None:
        return 0
    provers = []
    for attention, path in zip(
        sorted(report.attention, key=lambda a: a.layer_idx), report.attention_modules, strict=True
    ):
        layer = model.get_submodule(path.rpartition(".")[0])
        made = _of(layer, path, attention, report, modules, ctx)
        if made is not None:
            provers.append(_Prover(layer, made, dtype))
    if provers:
        _run_once(model, report, modules, ctx, dtype)
    fused = sum(p.settle() for p in provers)
    logger.info("%d of %d layers are run fused", fused, len(report.attention))
    return fused


def _of(
    layer: nn.Module,
    path: str,
    attention: LayerAttention,
    report: ArchReport,
    modules: Modules,
    ctx: ForwardContext,
) -> FusedLayer | None:
    """The layer in this form, if it is made of these parts and no others."""
    prefix = path.rpartition(".")[0] + "."
    groups = [g for names, g in modules.groups.items() if names.startswith(prefix)]
    norms = [n for name, n in modules.norms.items() if name.startswith(prefix)]
    heads, dim = attention.q_heads, attention.key_dim
    qkv = (heads + 2 * attention.kv_heads) * dim
    if (
        len(groups) != 4
        or len(norms) != 2
        or any(n.offset is None or n.token_dim is None for n in norms)
        or len(list(layer.parameters())) != 2
        or any(g.deltas is None for g in groups)
        or attention.value_dim != dim
        or attention.has_sinks
    ):
        return None
    shapes = [(g.base.in_features, g.base.out_features) for g in groups]
    hidden, inner = shapes[0][0], shapes[3][0]
    form = [(hidden, qkv), (heads * dim, hidden), (hidden, 2 * inner), (inner, hidden)]
    ours = groups[0].names[0].startswith(path + ".") and groups[1].names[0].startswith(path + ".")
    if shapes != form or not ours:
        return None
    return FusedLayer(ctx, attention, (norms[0], norms[1]), tuple(groups))  # type: ignore[arg-type]


class _Prover:
    """Stands for a layer's forward while the model runs once, and runs it both ways."""

    def __init__(self, layer: nn.Module, fused: FusedLayer, dtype: torch.dtype) -> None:
        self.layer, self.fused, self.dtype = layer, fused, dtype
        self.original = layer.forward
        self.same: bool | None = None
        self.given: Tensor | None = None
        layer.forward = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator)
        self.given = x
        inputs = [x, *((noise * m).to(self.dtype) for m in MAGNITUDES)]
        self.same = all(self._same(i, args, kwargs) for i in inputs)
        found: Tensor = self.original(x, *args, **kwargs)
        return found

    def _same(self, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        want: Any = self.original(x, *args, **kwargs)
        rotation = kwargs.get("position_embeddings")
        if not isinstance(want, Tensor) or not isinstance(rotation, tuple):
            return False
        if any(
            a.dtype != self.dtype or len(a) != 1 or a.shape[-1] > self.fused.dim for a in rotation
        ):
            return False
        added, tolerance = (want.double() - x.double()).norm(), TOLERANCES[self.dtype]
        slack = tolerance * added + torch.finfo(self.dtype).eps * x.double().norm()
        if (self.fused(x, *args, **kwargs).double() - want.double()).norm() > slack:
            return False
        # It would be no proof if the positions did not count.
        unturned = (torch.ones_like(rotation[0]), torch.zeros_like(rotation[1]))
        other = self.fused(x, *args, **{**kwargs, "position_embeddings": unturned})
        return bool(x is not self.given or (other.double() - want.double()).norm() > slack)

    def settle(self) -> bool:
        """Install the form that the run has decided on."""
        self.layer.forward = self.fused if self.same else self.original
        return bool(self.same)


@torch.inference_mode()
def _run_once(
    model: nn.Module,
    report: ArchReport,
    modules: Modules,
    ctx: ForwardContext,
    dtype: torch.dtype,
) -> None:
    """A step of one prompt; its positions lie apart, so that rotations tell."""
    keys, values = {}, {}
    for a in report.attention:
        keys[a.layer_idx] = torch.zeros(TOKENS, a.kv_heads, a.key_dim, dtype=dtype)
        values[a.layer_idx] = torch.zeros(TOKENS, a.kv_heads, a.value_dim, dtype=dtype)
    ctx.kv = KVStore(keys, values, TOKENS, 1)
    none = torch.zeros(0, dtype=torch.int64)
    chunk = PrefillChunk(0, TOKENS, 0, torch.zeros(1, dtype=torch.int64))
    ctx.attention = AttentionStep(torch.arange(TOKENS), 0, [], none, none.view(0, 0), [chunk])
    ids = torch.arange(TOKENS) * (modules.embedding.num_embeddings // TOKENS)
    positions = torch.tensor([0, 1, 5, 17, 64])
    model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=None,
        use_cache=False,
        logits_to_keep=torch.zeros(1, dtype=torch.int64),
    )
    ctx.kv = ctx.attention = None
