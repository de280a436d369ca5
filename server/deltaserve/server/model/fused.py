"""Decoder layers of Llama's form in a few native calls, or launches, where that is proven to be the
same.

A layer of the modeling code is some forty small torch operations, which on a CPU cost more than
the weights' bytes of a small model. Between its linears, which keep their adapters, the same is
done by three native kernels; a GPU's linears take in what lies between them (kernels/gpu/layer.py):

    h = x + o(attend(rope(qkv(norm(x)))));  y = h + down(silu(gate) * up),  [gate, up] = up(norm(h))

Which layers are of this form is decided by numbers, as with norms: each layer is run both ways, on
what the model gives it and on random inputs of several magnitudes. Others stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.kernels.attention.step import How, Span
from deltaserve.kernels.decoder import LayerParts, Linear, Norm
from deltaserve.server.model.adapted import Modules
from deltaserve.server.model.context import ForwardContext, KVStore
from deltaserve.server.model.fused_gpu import FusedGpuLayer
from deltaserve.server.model.fused_layer import FusedLayer
from deltaserve.server.model.linear import LinearGroup
from deltaserve.server.model.norm import DeltaNorm
from deltaserve.server.model.probe import ArchReport, LayerAttention
from deltaserve.server.model.stack import FusedStack, StackedLayer

logger = logging.getLogger(__name__)

MAGNITUDES = (0.03, 1.0, 20.0)
TOKENS = 5
# Of what the layer adds, in the 2-norm. bfloat16 rounds once here and several times there.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Where linears round their inputs to 8 bits. What differs by a rounding before may round to the
# next whole number then: seldom in float32, often in bfloat16.
ROUGH_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 5e-2}


def fuse(
    model: nn.Module,
    report: ArchReport,
    modules: Modules,
    ctx: ForwardContext,
    dtype: torch.dtype,
) -> int:
    """Lets every layer that is proven to be of the form run fused; returns how many. `ctx` must
    not be in use."""
    provers = []
    rough = any(group.base.rounds_inputs for group in modules.groups.values())
    tolerances = ROUGH_TOLERANCES if rough else TOLERANCES
    for attention, path in zip(
        sorted(report.attention, key=lambda a: a.layer_idx), report.attention_modules, strict=True
    ):
        layer = model.get_submodule(path.rpartition(".")[0])
        made = _of(layer, path, attention, report, modules, ctx)
        if made is not None:
            provers.append(_Prover(layer, made, dtype, tolerances[dtype]))
    if provers:
        _run_once(model, report, modules, ctx, dtype)
    fused = sum(p.settle() for p in provers)
    native = [p.fused for p in provers if isinstance(p.fused, FusedLayer)]
    if fused == len(report.attention) == len(native) and _one_after_another(provers):
        stack = FusedStack.of(ctx, native, modules.not_native)
        if stack is not None:
            for i, prover in enumerate(provers):
                prover.layer.forward = StackedLayer(stack, i)
    logger.info("%d of %d layers are run fused", fused, len(report.attention))
    return fused


def _of(
    layer: nn.Module,
    path: str,
    attention: LayerAttention,
    report: ArchReport,
    modules: Modules,
    ctx: ForwardContext,
) -> FusedLayer | FusedGpuLayer | None:
    """The layer in this form, if it is made of these parts and no others."""
    prefix = path.rpartition(".")[0] + "."
    groups = [g for names, g in modules.groups.items() if names.startswith(prefix)]
    norms = {name: n for name, n in modules.norms.items() if name.startswith(prefix)}
    of_heads = [n for name, n in norms.items() if name.startswith(path + ".")]
    of_tokens = [n for name, n in norms.items() if not name.startswith(path + ".")]
    heads, dim = attention.q_heads, attention.key_dim
    qkv = (heads + 2 * attention.kv_heads) * dim
    if (
        len(groups) != 4
        or len(of_tokens) != 2
        or len(of_heads) not in (0, 2)
        or any(n.offset is None or n.token_dim is None for n in norms.values())
        or len(list(layer.parameters())) != len(norms)
        or any(n.weight.shape != (dim,) for n in of_heads)
        or len({(n.offset, n.eps) for n in of_heads}) > 1
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
    first, second = of_tokens
    qkv_, o, up, down = groups
    layer_parts = LayerParts(
        norms=(_norm(first), _norm(second)),
        linears=(_linear(qkv_), _linear(o), _linear(up), _linear(down)),
        heads=heads,
        kv_heads=attention.kv_heads,
        dim=dim,
        how=How(attention.scale, attention.window, attention.softcap, None),
        head_norms=(_norm(of_heads[0]), _norm(of_heads[1])) if of_heads else None,
    )
    own = ctx.backend.layer(layer_parts)
    if own is not None:
        return FusedGpuLayer(ctx, attention, own)
    if of_heads or not ctx.backend.fuses:
        return None
    return FusedLayer(ctx, attention, (first, second), (qkv_, o, up, down))


def _norm(norm: DeltaNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.eps, norm.offset or 0.0, norm.deltas)


def _linear(group: LinearGroup) -> Linear:
    return Linear(group.deltas, group.base)


def _one_after_another(provers: list[_Prover]) -> bool:
    """Whether each layer was given what the one before it returned, and all the same rotation."""
    first = provers[0]
    return all(p.rotation is first.rotation for p in provers) and all(
        b.given is a.returned for a, b in pairwise(provers)
    )


class _Prover:
    """Stands for a layer's forward while the model runs once, and runs it both ways."""

    def __init__(
        self,
        layer: nn.Module,
        fused: FusedLayer | FusedGpuLayer,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        self.layer, self.fused, self.dtype, self.tolerance = layer, fused, dtype, tolerance
        self.original = layer.forward
        self.same: bool | None = None
        self.given: Tensor | None = None
        self.returned: Tensor | None = None
        self.rotation: Any = None
        layer.forward = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator)
        self.given, self.rotation = x, kwargs.get("position_embeddings")
        inputs = [x, *((noise * m).to(x) for m in MAGNITUDES)]
        self.same = all(self._same(i, args, kwargs) for i in inputs)
        found: Tensor = self.original(x, *args, **kwargs)
        self.returned = found
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
        added = (want.double() - x.double()).norm()
        slack = self.tolerance * added + torch.finfo(self.dtype).eps * x.double().norm()
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
    device = ctx.backend.device
    ctx.kv = KVStore.zeros(report.attention, 1, TOKENS, dtype, ctx.backend)
    ctx.attention = ctx.backend.attention([Span(0, TOKENS, [0])], 0, TOKENS)
    ids = torch.arange(TOKENS, device=device) * (modules.embedding.num_embeddings // TOKENS)
    positions = torch.tensor([0, 1, 5, 17, 64], device=device)
    model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=None,
        use_cache=False,
        logits_to_keep=torch.zeros(1, dtype=torch.int64, device=device),
    )
    ctx.kv = ctx.attention = None
