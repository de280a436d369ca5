"""A group of linears on the GPU, or in the interpreter, with what it should give in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from kernel_oracle import in_8_bits, relative_error, served
from torch import Tensor

from deltaserve.kernels.base import BaseLinear
from deltaserve.kernels.gpu.base import GpuLinear, make_linear
from deltaserve.kernels.gpu.convert import held_on_gpu
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.primitives import Primitive
from deltaserve.kernels.segments import Segments

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}

MIXED = Segments(
    [
        (1, 2, ((1, 1.0),)),
        (2, 5, ((2, 1.0), (1, -0.5))),
        (6, 7, ((3, 0.25),)),
        (7, 24, ((3, 1.0),)),
        (25, 26, ((2, 1.5), (3, 0.5), (1, 1.0))),
        (26, 37, ((2, 1.0),)),
    ],
    38,
)


class GpuRig:
    """adapters: {slot: {part: primitives}}, installed. held: the base as loading leaves it; else
    one is made of random weights."""

    def __init__(
        self,
        inner: int,
        outs: Sequence[int],
        dtype: torch.dtype,
        adapters: Mapping[int, Mapping[int, tuple[Primitive, ...]]],
        *,
        quantize: str = "none",
        group_size: int = 128,
        bias: bool = True,
        held: BaseLinear | None = None,
        activations: str = "float",
    ) -> None:
        self.inner, self.outs, self.dtype = inner, tuple(outs), dtype
        self.adapters = dict(adapters)
        self.device = default_device()
        self.base: GpuLinear
        if held is None:
            weight = torch.randn(sum(outs), inner) / inner**0.5
            given = torch.randn(sum(outs)) if bias else None
            self.base = make_linear(
                weight, given, dtype=dtype, quantize=quantize, group_size=group_size,
                activations=activations,
            )  # fmt: skip
        else:
            self.base = held_on_gpu(held, self.device, Workspace(self.device))
        self.read = partial(in_8_bits, dtype=dtype) if activations == "int8" else Tensor.double
        self.weight = (self.base if held is None else held).weight().cpu()
        self.bias = None if self.base.bias is None else self.base.bias.cpu()
        self.deltas = GpuLinearDeltas(inner, outs, dtype)
        for slot, parts in adapters.items():
            self.deltas.install(slot, self.deltas.prepare(parts))

    def x(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.inner).to(self.device, self.dtype)

    def parts(self, x: Tensor, segments: Segments) -> list[Tensor]:
        """What each module should give, float64."""
        found, start = [], 0
        for part, out in enumerate(self.outs):
            rows = slice(start, start + out)
            own = {slot: parts.get(part, ()) for slot, parts in self.adapters.items()}
            bias = None if self.bias is None else self.bias[rows]
            found.append(served(x.cpu(), self.weight[rows], bias, own, segments, self.read))
            start += out
        return found

    def check(self, segments: Segments) -> None:
        """forward is right, twice over memory that holds NaN, and base rows are untouched."""
        x = self.x(segments.tokens)
        given = x.clone()
        for _ in range(2):
            y = self.deltas.forward(x, self.base, segments)
            assert y.dtype == self.dtype and torch.equal(x, given)
            if segments.tokens:
                expected = torch.cat(self.parts(x, segments), 1)
                assert relative_error(y.cpu(), expected) < TOLERANCE[self.dtype]
            self.deltas.workspace.poison()
        plain = torch.ones(segments.tokens, dtype=torch.bool)
        for start, end, _ in segments.runs:
            plain[start:end] = False
        alone = self.deltas.forward(x, self.base, Segments([], segments.tokens))
        assert torch.equal(y[plain], alone[plain])
