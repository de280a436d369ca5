"""Takes a loaded transformers model apart: its linears, norms and input embedding are replaced in
place, one group at a time, so that no weight is held twice for longer than its group takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaserve.kernels.backend import Backend, UnsupportedWeights
from deltaserve.kernels.base import BaseLinear, concat
from deltaserve.server.model.adapted import Modules
from deltaserve.server.model.context import ForwardContext
from deltaserve.server.model.embedding import DeltaEmbedding
from deltaserve.server.model.errors import UnsupportedModel
from deltaserve.server.model.linear import LinearGroup, replacements
from deltaserve.server.model.memory import trim
from deltaserve.server.model.norm import DeltaNorm
from deltaserve.server.model.probe import ArchReport
from deltaserve.server.model.quantizer import Scheme


def assemble(
    model: nn.Module,
    report: ArchReport,
    schemes: Mapping[str, Scheme],
    quantized: dict[str, BaseLinear],
    ctx: ForwardContext,
    dtype: torch.dtype,
    on_group: Callable[[float], None],
) -> Modules:
    """quantized: linears whose weights were quantized while loading, or before; emptied. schemes:
    of those whose weights are to be quantized; one that is not in `quantized` (a tied lm_head) is
    quantized here. Raises UnsupportedModel for weights that the backend cannot compute with."""
    model.to(ctx.backend.device)
    groups = []
    split = [part for names in report.groups for part in _split(names, schemes, quantized)]
    for done, names in enumerate(split):
        base = _base(model, names, schemes, quantized, ctx.backend)
        sizes = [_sizes(model.get_submodule(name))[1] for name in names]
        by_token = all(name in report.by_token for name in names)
        group = LinearGroup(
            names, base, sizes, ctx, by_token=by_token, logits=names[0] == report.head
        )
        groups.append(group)
        for name, new in replacements(group).items():
            _replace(model, name, new)
        trim()
        on_group((done + 1) / len(split))
    norms = {}
    for name, token_dim in report.norms.items():
        norms[name] = DeltaNorm(model.get_submodule(name), ctx, dtype, token_dim)
        _replace(model, name, norms[name])
    embedding = DeltaEmbedding(model.get_submodule(report.embedding), ctx, dtype)
    _replace(model, report.embedding, embedding)
    for name in report.attention_modules:
        attention: Any = model.get_submodule(name)
        attention.ctx = ctx
    _own(model)
    _shorten_lookups(model)
    return Modules(tuple(groups), (report.embedding, embedding), norms, tuple(report.experts))


def _own(model: nn.Module) -> None:
    """What was neither packed anew nor copied to a device is still mapped from the checkpoint's
    files, and would change with them."""
    for parameter in model.parameters():
        if parameter.is_cpu:
            parameter.data = parameter.data.clone()


def _shorten_lookups(model: nn.Module) -> None:
    """Puts child modules among the plain attributes, where Python finds them before it falls back
    to `nn.Module.__getattr__`: some ten microseconds of every layer of a decode step."""
    for module in model.modules():
        for name, child in module.named_children():
            module.__dict__[name] = child


def _split(
    names: tuple[str, ...], schemes: Mapping[str, Scheme], quantized: Mapping[str, BaseLinear]
) -> list[tuple[str, ...]]:
    """A group's members that are held alike stay together."""
    alike: dict[Hashable, list[str]] = {}
    for name in names:
        made = quantized.get(name)
        key = schemes.get(name) if made is None else made.likeness()
        alike.setdefault(key, []).append(name)
    return [tuple(part) for part in alike.values()]


def _base(
    model: nn.Module,
    names: tuple[str, ...],
    schemes: Mapping[str, Scheme],
    quantized: dict[str, BaseLinear],
    backend: Backend,
) -> BaseLinear:
    modules: list[Any] = [model.get_submodule(name) for name in names]
    biases: list[Tensor | None] = [module.bias for module in modules]
    bias = _joined_bias(biases, [_sizes(module)[1] for module in modules])
    if names[0] not in schemes and names[0] not in quantized:
        weights = [m.weight.T if isinstance(m, Conv1D) else m.weight for m in modules]
        weight = weights[0] if len(weights) == 1 else torch.cat([w.detach() for w in weights])
        return backend.dense(weight.detach(), bias, weight.dtype)
    parts = []
    for name, module in zip(names, modules, strict=True):
        made = quantized.pop(name, None)
        parts.append(schemes[name].linear(module.weight.detach().cpu()) if made is None else made)
    base = concat(parts)
    if bias is not None:
        base.set_bias(bias.cpu())
    try:
        return backend.linear(base)
    except UnsupportedWeights as error:
        raise UnsupportedModel(f"--device {backend.name}: {', '.join(names)}: {error}") from error


def _joined_bias(biases: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    zeros = [given.new_zeros(size) for size in sizes]
    whole = [z if bias is None else bias.detach() for bias, z in zip(biases, zeros, strict=True)]
    return torch.cat(whole)


def _sizes(module: Any) -> tuple[int, int]:
    """(in, out)."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
