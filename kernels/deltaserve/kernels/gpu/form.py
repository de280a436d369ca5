"""Form: how a base's weights are held, as far as kernels differ by it, and random ones of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.base.w8a8 import round_tokens
from deltaserve.kernels.gpu.base import DEEPEST, FOUR_BITS, WITH_ZEROS, GpuLinear
from deltaserve.kernels.gpu.config import WHOLE
from deltaserve.kernels.gpu.variants import GroupSpec


@dataclass(frozen=True, order=True, slots=True)
class Form:
    """format, group_size: as of `GpuLinear`. ordered: its inputs are in an order of their own."""

    format: str
    group_size: int = 0
    ordered: bool = False

    @staticmethod
    def of(spec: GroupSpec) -> Form:
        """The form of a model's linears, with groups that fit into the widths that are tried."""
        return Form(spec.format, min(spec.key.group_size, DEEPEST), spec.ordered)

    def __str__(self) -> str:
        if self.format == "dense":
            return "unquantized"
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.format}{groups}{' in an order' if self.ordered else ''}"

    def linear(
        self, outs: Sequence[int], inner: int, dtype: torch.dtype, device: torch.device
    ) -> GpuLinear:
        """Random weights of about 1 / inner**0.5, and a bias."""
        out = sum(outs)
        held = self._weights(out, inner)
        held["bias"] = torch.randn(out)
        if self.ordered:
            held["order"] = torch.randperm(inner)
        return GpuLinear(held, self.format, dtype, self.group_size, device)

    def _weights(self, out: int, inner: int) -> dict[str, Tensor]:
        if self.format == "dense":
            return {"weight": torch.randn(out, inner) / inner**0.5}
        if self.format == "fp8":
            q = torch.randn(out, inner).to(torch.float8_e4m3fn).view(torch.uint8)
            size = 1.0
        elif self.format in FOUR_BITS:
            q, size = torch.randint(0, 16, (out, inner), dtype=torch.uint8), 4.6
        else:
            q, size = torch.randint(-127, 128, (out, inner)).to(torch.int8), 74.0
        if self.format == "code4":
            size = 1.0
        shape = (out, -(-inner // self.group_size)) if self.group_size else (out,)
        held = {"q": q, "scale": (torch.rand(shape) + 0.5) / (size * inner**0.5)}
        if self.format in WITH_ZEROS:
            middle = 0 if self.format == "uint8" else 8
            held["zero"] = torch.randint(middle - 3, middle + 4, shape).float()
        elif self.format == "code4":
            held["code"] = torch.randn(16)
        return held


def as_read(base: GpuLinear, x: Tensor) -> Tensor:
    """x [T, in] as the base's product takes it, float64: as it is, or in 8 bits."""
    if base.format not in WHOLE:
        return x.double()
    q, scale = round_tokens(x.to(base.dtype))
    return q.double() * scale.double()[:, None]
