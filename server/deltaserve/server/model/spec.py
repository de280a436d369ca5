"""BaseSpec of a loaded model: what adapters are lowered against."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.adapters.base import BaseSpec, LayerKV, ModuleKind, ModuleSpec
from deltaserve.adapters.fingerprint import fingerprint, tensor_digests
from deltaserve.server.model.adapted import Modules
from deltaserve.server.model.memory import trim
from deltaserve.server.model.probe import ArchReport


def original_modules(model: nn.Module, report: ArchReport) -> dict[str, ModuleSpec]:
    """Module path -> what it is, in the model's order; of the model as transformers builds it (on
    any device)."""
    found: dict[str, ModuleSpec] = {}
    paths = [name for group in report.groups for name in group]
    known = {report.embedding, *paths, *report.norms}
    for name in (name for name, _ in model.named_modules() if name in known):
        module: Any = model.get_submodule(name)
        class_name = type(module).__name__
        rows, columns = (*module.weight.shape, *module.weight.shape)[:2]
        transposed = class_name == "Conv1D"
        kind = ModuleKind.LINEAR
        if name == report.embedding:
            kind = ModuleKind.EMBEDDING
        elif name in report.norms:
            kind = ModuleKind.NORM
        across = kind is ModuleKind.EMBEDDING or transposed
        found[name] = ModuleSpec(
            name=name,
            kind=kind,
            in_features=rows if across else columns,
            out_features=columns if across else rows,
            has_bias=getattr(module, "bias", None) is not None,
            transposed=transposed,
            class_name=class_name,
        )
    return found


def base_spec(
    folder: Path,
    config: Mapping[str, Any],
    sizes: tuple[int, int],
    report: ArchReport,
    found: Mapping[str, ModuleSpec],
    modules: Modules,
    tied: Mapping[str, str],
    quantization: str,
) -> BaseSpec:
    """sizes: (hidden, vocabulary). Reads the whole checkpoint once more, for its digests."""
    digests = tensor_digests(folder)
    weights = _Weights(modules, found)
    return BaseSpec(
        modules=found,
        layers=tuple(LayerKV(a.kv_heads, a.key_dim, a.value_dim) for a in report.attention),
        hidden_size=sizes[0],
        vocab_size=sizes[1],
        name=str(config.get("_name_or_path") or folder.name),
        fingerprint=fingerprint(digests),
        held_fingerprint=held_fingerprint(modules),
        quantization=quantization,
        config=config,
        weight=weights.weight,
        bias=weights.bias,
        tied=tied,
        tensor_digests=digests,
    )


class _Weights:
    """The accessors of BaseSpec; tensors in host memory."""

    def __init__(self, modules: Modules, found: Mapping[str, ModuleSpec]) -> None:
        self.modules = modules
        self.found = found

    def weight(self, name: str) -> Tensor:
        """float32, in checkpoint layout. Raises KeyError for a name that is not in `modules`."""
        if name == self.modules.embedding_name:
            return self._host(self.modules.embedding.weight)
        if name in self.modules.norms:
            return self._host(self.modules.norms[name].weight)
        weight = self.modules.group_of[name].weight(name)
        return weight.T.contiguous() if self.found[name].transposed else weight

    def bias(self, name: str) -> Tensor | None:
        """float32 [out]. Raises KeyError for a name that is not in `modules`."""
        if name == self.modules.embedding_name:
            return None
        if name in self.modules.norms:
            bias: Any = getattr(self.modules.norms[name].inner, "bias", None)
            return None if bias is None else self._host(bias)
        return self.modules.group_of[name].bias(name)

    def _host(self, tensor: Tensor) -> Tensor:
        return self.modules.embedding.ctx.backend.to_host(tensor.detach()).float()


def held_fingerprint(modules: Modules) -> str:
    """blake2b-128 (hex) over every tensor that adapters may be made against, as it is held."""
    total = hashlib.blake2b(digest_size=16)

    def add(name: str, tensor: Tensor) -> None:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    add(modules.embedding_name, modules.embedding.weight)
    for name, norm in sorted(modules.norms.items()):
        add(name, norm.weight)
    for _, group in sorted(modules.groups.items()):
        for part, tensor in group.base.held().items():
            add(f"{'+'.join(group.names)}.{part}", tensor)
        trim()
    return total.hexdigest()
