"""Packed: the tensors that a quantized checkpoint holds in place of one linear's weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.base import BaseLinear
from deltaserve.server.model.errors import MalformedModel

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

Read = Callable[[], Tensor]
Build = Callable[["Packed", int, int, torch.dtype], BaseLinear]


class Packed:
    """Goes through transformers' loader in place of a weight, which it renames as it would the
    weight itself; nothing is read before the linear is built.

    module: its path in the checkpoint. parts: what follows the module's path in a tensor's name,
    and how to read the tensor. build: makes the linear of (this, out, in, dtype).
    """

    def __init__(self, module: str, parts: Mapping[str, Read], build: Build) -> None:
        self.module = module
        self.parts = parts
        self._build = build

    def linear(self, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        """Without a bias. Raises MalformedModel or UnsupportedModel naming the tensor."""
        return self._build(self, out, inner, dtype)

    def take(
        self,
        part: str,
        shape: tuple[int, ...] | None,
        dtypes: tuple[torch.dtype, ...],
        *,
        raw: bool = False,
    ) -> Tensor:
        """One of the tensors, checked. Floats come in float32 and are finite, unless they are only
        bytes (raw)."""
        name = f"{self.module}.{part}"
        read = self.parts.get(part)
        if read is None:
            raise MalformedModel(f"{name} is missing beside {self._beside()}")
        tensor = read()
        if tensor.dtype not in dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise MalformedModel(f"{name} is {tensor.dtype}; it must be {known}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise MalformedModel(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
        if tensor.dtype in FLOATS and not raw:
            tensor = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise MalformedModel(f"{name} has values that are not finite")
        return tensor

    def _beside(self) -> str:
        return ", ".join(f"{self.module}.{part}" for part in sorted(self.parts))

    # What transformers asks of a tensor on its way to the quantizer.

    def __getitem__(self, index: Any) -> Packed:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Packed:
        return self
