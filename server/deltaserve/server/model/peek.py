"""peek(): the BaseSpec of a checkpoint from its headers; a weight is read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.base import BaseSpec, LayerKV, ModuleKind, ModuleSpec
from deltaserve.adapters.checkpoint import Checkpoint, open_files
from deltaserve.adapters.errors import UnsupportedAdapter
from deltaserve.adapters.fingerprint import fingerprint, tensor_digest, tensor_digests
from deltaserve.adapters.safetensors_header import BASE_DTYPES
from deltaserve.kernels import embedding
from deltaserve.kernels.check import check_linear
from deltaserve.kernels.norm import NormDeltas
from deltaserve.kernels.table import Group
from deltaserve.server.model.loader import Skeleton, checkpoint_folder, load, skeleton_of
from deltaserve.server.model.probe import ArchReport

DTYPE = torch.float32
"""As which the base is taken: every cast of a checkpoint is exact."""


@dataclass(frozen=True)
class Peek:
    """spec: of the base as it would be served in float32, not quantized further than its
    checkpoint is, but for its fingerprints. report: of the dry run."""

    spec: BaseSpec
    report: ArchReport
    folder: Path

    def fingerprinted(self) -> BaseSpec:
        """The spec with the checkpoint's fingerprint, for which all of it is read."""
        return replace(self.spec, fingerprint=fingerprint(tensor_digests(self.folder)))

    def check(self, adapter: Adapter) -> None:
        """`UnsupportedAdapter` for what a module of the base cannot take; what only the weights
        can tell (whether an unusual embedding is linear) is left to the server."""
        for name, primitives in adapter.modules.items():
            module = self.spec.modules[name]
            reason = self._refusal(name)
            if reason:
                raise UnsupportedAdapter(f"{name}: {reason}", field=name)
            try:
                if module.kind is ModuleKind.EMBEDDING:
                    shape = module.in_features, module.out_features
                    embedding.prepare(primitives, *shape, DTYPE)
                elif module.kind is ModuleKind.NORM:
                    NormDeltas(module.out_features, DTYPE).prepare(primitives)
                else:
                    group = Group(module.in_features, (module.out_features,), DTYPE)
                    check_linear(0, primitives, group)
            except (TypeError, ValueError) as error:
                raise UnsupportedAdapter(f"{name}: {error}", field=name) from error

    def _refusal(self, name: str) -> str:
        """Why no adapter can act on the module; empty if one can."""
        if any(name == path or name.startswith(f"{path}.") for path in self.report.experts):
            return "fused experts take no adapters"
        by_token = self.report.by_token | {self.report.embedding}
        by_token |= {norm for norm, dim in self.report.norms.items() if dim is not None}
        return "" if name in by_token else "its inputs are not one row per token"


@contextmanager
def peek(path: str | Path, *, allow_untested: bool = False) -> Iterator[Peek]:
    """The base in ``path``, its files open as long as the ``with`` lasts. Raises what `load`
    raises."""
    folder = checkpoint_folder(Path(path))
    skeleton = skeleton_of(folder, DTYPE, None, allow_untested)
    config = skeleton.config.to_dict()
    with open_files(folder, ("model",)) as fds:
        weights = _Weights(folder, skeleton, Checkpoint(folder, fds, BASE_DTYPES))
        spec = BaseSpec(
            modules=skeleton.modules,
            layers=tuple(
                LayerKV(a.kv_heads, a.key_dim, a.value_dim) for a in skeleton.report.attention
            ),
            hidden_size=int(skeleton.config.get_text_config().hidden_size),
            vocab_size=skeleton.modules[skeleton.report.head].out_features,
            name=str(config.get("_name_or_path") or folder.name),
            fingerprint="",
            held_fingerprint="",
            quantization="none" if skeleton.stored is None else skeleton.stored.label,
            config=config,
            weight=weights.weight,
            bias=weights.bias,
            tied=skeleton.tied,
            tensor_digests=_Digests(weights.checkpoint),
        )
        yield Peek(spec, skeleton.report, folder)


class _Digests(Mapping[str, str]):
    """Checkpoint tensor -> digest, computed when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> str:
        if name not in self._checkpoint.entries:
            raise KeyError(name)
        return tensor_digest(self._checkpoint.tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.entries)

    def __len__(self) -> int:
        return len(self._checkpoint.entries)


class _Weights:
    """The accessors of BaseSpec. A tensor that the checkpoint does not hold under the module's own
    name in the module's own shape (transformers makes some of several) has the whole model read."""

    def __init__(self, folder: Path, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._folder = folder
        self._skeleton = skeleton

    def weight(self, name: str) -> Tensor:
        """float32, in checkpoint layout. Raises KeyError for a name that is not a module's."""
        module = self._skeleton.modules[name]
        found = self._find(self._skeleton.tied.get(name, name), "weight", _shape(module))
        return self._whole.weight(name) if found is None else found

    def bias(self, name: str) -> Tensor | None:
        """float32 [out]. Raises KeyError for a name that is not a module's."""
        module = self._skeleton.modules[name]
        if not module.has_bias:
            return None
        found = self._find(name, "bias", (module.out_features,))
        return self._whole.bias(name) if found is None else found

    def _find(self, module: str, what: str, shape: tuple[int, ...]) -> Tensor | None:
        prefix = self._skeleton.prefix
        linear = self._skeleton.modules[module].kind is ModuleKind.LINEAR
        if linear and self._skeleton.stored is not None:
            return None
        for path in (module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}"):
            entry = self.checkpoint.entries.get(f"{path}.{what}")
            if entry is not None and entry.shape == shape:
                return self.checkpoint.tensor(f"{path}.{what}").to(DTYPE)
        return None

    @cached_property
    def _whole(self) -> BaseSpec:
        return load(self._folder, dtype=DTYPE, allow_untested=True).spec


def _shape(module: ModuleSpec) -> tuple[int, ...]:
    """Of the weight in the checkpoint."""
    if module.kind is ModuleKind.NORM:
        return (module.out_features,)
    if module.transposed or module.kind is ModuleKind.EMBEDDING:
        return module.in_features, module.out_features
    return module.out_features, module.in_features
