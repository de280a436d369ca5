"""Format: one way in which checkpoints hold quantized weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from deltaserve.adapters.safetensors_header import TensorEntry
from deltaserve.kernels.base import BaseLinear
from deltaserve.server.model.errors import MalformedModel
from deltaserve.server.model.quantized.packed import Packed


class Format(ABC):
    """Made from a config's `quantization_config`; raises UnsupportedModel naming the field that
    asks for something else than is read.

    label: what `BaseSpec.quantization` says. notes: what is computed otherwise than the config
    asks for, in words. parts: what follows a module's path in the names of its packed tensors.
    marks: parts by which a packed module is known.
    """

    label: str
    notes: tuple[str, ...] = ()
    marks: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def linear(self, packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        """The linear that the tensors hold, without a bias."""

    def modules(self, entries: Mapping[str, TensorEntry]) -> dict[str, list[str]]:
        """Path of a packed module -> parts of it that the checkpoint has."""
        found: dict[str, list[str]] = {}
        for mark in self.marks:
            ends = f".{mark}"
            found |= {n.removesuffix(ends): [] for n in entries if n.endswith(ends)}
        for module, parts in found.items():
            parts += [part for part in self.parts if f"{module}.{part}" in entries]
            if "weight" not in self.parts and f"{module}.weight" in entries:
                raise MalformedModel(f"{module} has both {parts[0]} and weight")
        for name, entry in entries.items():
            bare = entry.dtype == torch.float8_e4m3fn
            if bare and name.rpartition(".")[0] not in found:
                raise MalformedModel(f"{name} is of 8-bit floats and has no scale")
        return found
