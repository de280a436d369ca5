"""Linears as the modeling code sees them: the base's product with the adapters' deltas, several
sibling linears that share their input computed as one."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor, nn

from deltaserve.kernels.base import BaseLinear
from deltaserve.kernels.segments import Segments
from deltaserve.server.model.context import ForwardContext


class LinearGroup:
    """One base linear over the outputs of one or more modules, and the deltas on it.

    names: the modules, in the order of their outputs. deltas: None if the rows of the modules'
    input are not the step's tokens. logits: its rows are the ones logits are asked of.
    """

    def __init__(
        self,
        names: Sequence[str],
        base: BaseLinear,
        sizes: Sequence[int],
        ctx: ForwardContext,
        *,
        by_token: bool,
        logits: bool = False,
    ) -> None:
        self.names = tuple(names)
        self.base = base
        self.sizes = list(sizes)
        self.ctx = ctx
        self.logits = logits
        shape = base.in_features, self.sizes, base.dtype
        self.deltas = ctx.backend.deltas(*shape) if by_token else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> [rows, out]."""
        rows = x.view(-1, x.shape[-1])
        segments: Segments = self.ctx.logit_segments if self.logits else self.ctx.segments
        if segments and self.deltas is not None:
            return self.deltas.forward(rows, self.base, segments)
        return self.base(rows)

    def weight(self, name: str) -> Tensor:
        """float32 [out, in] of one module, as served, in host memory."""
        return self.base.weight_rows(*self._span(name))

    def bias(self, name: str) -> Tensor | None:
        """float32 [out] of one module, in host memory."""
        start, end = self._span(name)
        if self.base.bias is None:
            return None
        return self.ctx.backend.to_host(self.base.bias[start:end]).float()

    def _span(self, name: str) -> tuple[int, int]:
        i = self.names.index(name)
        start = sum(self.sizes[:i])
        return start, start + self.sizes[i]


class _Linear(nn.Module):
    """What modeling code may read of a linear beside calling it. `weight` has the shape, dtype and
    device of the base's but no content: whatever were computed from it would be NaN."""

    def __init__(self, group: LinearGroup, out_features: int) -> None:
        super().__init__()
        base = group.base
        self.in_features = base.in_features
        self.out_features = out_features
        nothing = torch.full((), nan, dtype=base.dtype, device=group.ctx.backend.device)
        self.weight = nothing.expand(out_features, base.in_features)
        self.bias = None


class DeltaLinear(_Linear):
    """A linear of its own."""

    def __init__(self, group: LinearGroup) -> None:
        super().__init__(group, group.base.out_features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = self.group(x)
        return y.unsqueeze(0) if x.dim() == 3 and len(x) == 1 else y.view(*x.shape[:-1], -1)

    __call__ = forward  # no hooks: nn.Module's own detour costs as much as a small kernel


class _Shared:
    """What the leader leaves for its followers. Not attributes of the leader: setting those on an
    nn.Module is slow."""

    __slots__ = ("group", "parts", "x")

    def __init__(self, group: LinearGroup) -> None:
        self.group = group
        self.x: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()


class Leader(_Linear):
    """The first of its group to be called: computes all of it, returns its part."""

    def __init__(self, shared: _Shared) -> None:
        group = shared.group
        super().__init__(group, group.sizes[0])
        self.group = group
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, in] or [T, in] -> the same with out."""
        y = self.group(x)
        if x.dim() == 3:
            y = y.unsqueeze(0)
        parts: tuple[Tensor, ...] = y.split_with_sizes(self.group.sizes, -1)
        shared = self.shared
        shared.x, shared.parts = x, parts
        return parts[0]

    __call__ = forward


class Follower(_Linear):
    """Another of the group: returns its part of what the leader computed of the same input."""

    def __init__(self, shared: _Shared, index: int) -> None:
        group = shared.group
        super().__init__(group, group.sizes[index])
        self.shared = shared
        self.index = index
        self.last = index == len(group.sizes) - 1

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, in] or [T, in] -> the same with out."""
        shared = self.shared
        if shared.x is not x:
            names = shared.group.names
            raise RuntimeError(
                f"{names[self.index]} is not given the input of {names[0]}, with which it is "
                "computed"
            )
        part = shared.parts[self.index]
        if self.last:
            shared.x, shared.parts = None, ()
        return part

    __call__ = forward


def replacements(group: LinearGroup) -> dict[str, nn.Module]:
    """Module path -> what stands there instead of the linear."""
    if len(group.names) == 1:
        return {group.names[0]: DeltaLinear(group)}
    shared = _Shared(group)
    followers = {n: Follower(shared, i) for i, n in enumerate(group.names) if i > 0}
    return {group.names[0]: Leader(shared), **followers}
