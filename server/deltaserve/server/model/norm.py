"""Norms: our fused RMS norm where it is proven equal, and the gains of tuned norms."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.kernels.norm import PreparedNorm
from deltaserve.kernels.rms_norm import rms_norm
from deltaserve.server.model.context import ForwardContext


class DeltaNorm(nn.Module):
    """Stands where a norm stood. `offset` is what the norm adds to its gain (1 in Gemma) if it was
    proven to be an RMS norm, else None, and then the model's own module computes it. token_dim:
    the dimension of its input that is the step's tokens; None if there is none such, and then it
    takes no adapters."""

    def __init__(
        self, inner: nn.Module, ctx: ForwardContext, dtype: torch.dtype, token_dim: int | None
    ) -> None:
        super().__init__()
        weight: Any = inner.weight
        self.inner = inner
        self.ctx = ctx
        self.token_dim = token_dim
        self.slots: set[int] = set()  # of the installed adapters that have a part here
        self.deltas = ctx.backend.norm_deltas(weight.shape[0], dtype)
        form = rms_form(inner)
        self.offset: float | None = None if form is None else form[0]
        self.eps = 0.0 if form is None else form[1]
        self.gain: Tensor = weight.detach() + (self.offset or 0.0)

    @property
    def weight(self) -> Tensor:
        weight: Any = self.inner.weight
        found: Tensor = weight
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, ..., hidden] -> the same shape."""
        if self.deltas.by_token and self._one_row_each(x):
            weight, of = self.weight, (self.offset or 0.0, self.eps, self.ctx.segments)
            return self.deltas.rms(x.reshape(-1, len(weight)), weight, *of).view(x.shape)
        if self.slots and self.ctx.segments:
            assert self.token_dim is not None
            rows = x.movedim(self.token_dim, 0)
            return self._tuned(rows).movedim(0, self.token_dim)
        if self.offset is not None:
            return rms_norm(x, self.gain, self.eps)
        found: Tensor = self.inner(x)
        return found

    def _one_row_each(self, x: Tensor) -> bool:
        """Whether it is an RMS norm of one row of x for each token."""
        dim, weight = self.token_dim, self.weight
        if dim is None or not self.is_rms or x.dtype != weight.dtype:
            return False
        return x.numel() == x.shape[dim] * len(weight)

    @property
    def is_rms(self) -> bool:
        """Whether it is an RMS norm that adapters may act on."""
        return self.offset is not None and self.token_dim is not None

    def _tuned(self, rows: Tensor) -> Tensor:
        """rows: [T, ..., hidden] -> the same."""
        deltas, weight, segments = self.deltas, self.weight, self.ctx.segments
        if self.offset is not None and rows.dtype == weight.dtype:
            return deltas.rms(rows.contiguous(), weight, self.offset, self.eps, segments)
        return deltas.forward(rows, self.apply_gain, weight, segments)

    __call__ = forward  # no hooks: nn.Module's own detour costs as much as a small kernel

    def install(self, slot: int, prepared: PreparedNorm) -> None:
        self.deltas.install(slot, prepared)
        self.slots.add(slot)

    def remove(self, slot: int) -> None:
        self.deltas.remove(slot)
        self.slots.discard(slot)

    def apply_gain(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """The norm of rows x with another gain (the checkpoint's parameter, not what is added)."""
        if gain is None:
            return self.base(x)
        gain = gain.to(self.weight.dtype)
        if self.offset is not None:
            return rms_norm(x, gain + self.offset, self.eps)
        found: Tensor = torch.func.functional_call(self.inner, {"weight": gain}, (x,))
        return found

    def base(self, x: Tensor) -> Tensor:
        """The base's own norm."""
        if self.offset is not None:
            return rms_norm(x, self.gain, self.eps)
        found: Tensor = self.inner(x)
        return found


@torch.no_grad()
def rms_form(inner: nn.Module) -> tuple[float, float] | None:
    """(offset, eps) if the module computes ``x / rms(x) * (offset + weight)``, else None.

    Decided by numbers: in float32 with random gains and inputs of several magnitudes (the smallest
    ones tell the eps), and again in the dtype it is served in.
    """
    weight: Any = inner.weight
    eps = next(
        (
            float(v)
            for n in ("variance_epsilon", "eps", "epsilon", "norm_eps")
            if isinstance(v := getattr(inner, n, None), float)
        ),
        None,
    )
    if eps is None or getattr(inner, "bias", None) is not None:
        return None
    generator = torch.Generator().manual_seed(0)
    n = weight.shape[0]
    scales = torch.tensor([1e-4, 1e-2, 1.0, 30.0])[:, None]
    x = (torch.randn(4, n, generator=generator) * scales).to(weight.device)
    # in bfloat16 a gain of 1 + weight would be rounded where the models keep it in float32
    offsets = (0.0, 1.0) if weight.dtype == torch.float32 else (0.0,)
    for offset in offsets:
        if all(
            _same(inner, x, offset, eps, dtype, tolerance, generator)
            for dtype, tolerance in ((torch.float32, 3e-6), (weight.dtype, None))
        ):
            return offset, eps
    return None


def _same(
    inner: nn.Module,
    x: Tensor,
    offset: float,
    eps: float,
    dtype: torch.dtype,
    tolerance: float | None,
    generator: torch.Generator,
) -> bool:
    gain = (torch.randn(x.shape[-1], generator=generator) * 0.3 + 0.7).to(x.device, dtype)
    module = copy.deepcopy(inner).to(dtype)
    module.weight = nn.Parameter(gain, requires_grad=False)
    x = x.to(dtype)
    got = rms_norm(x, gain + offset, eps)
    want = module(x[None])[0]
    if got.dtype != want.dtype:
        return False
    if tolerance is None:  # two roundings where the other does one
        tolerance = 3 * torch.finfo(dtype).eps
    return torch.allclose(got.double(), want.double(), rtol=tolerance, atol=1e-30)
