"""GpuLayer: a decoder layer of Llama's form in eight launches, or twelve with adapters, whatever
the mix; one more where attention is split, and one where the step has prompts.

What a group of linears wants of its input beside x is made by the kernel that makes x: the norms,
attention, the epilogue of gate and up. Only adapters whose 1-bit or sparse deltas or scaled inputs
are on o or down, and weights whose inputs are in an order of their own, cost a launch of
inputs_kernel there.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from deltaserve.kernels.attention.gpu import paged_attention, sum_step
from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.step import AttentionStep
from deltaserve.kernels.decoder import Beside, LayerParts, Linear, Norm
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.gemm import Output, can_gate, choose, tile_rows
from deltaserve.kernels.gpu.inputs import Inputs, Wanted
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm import Following, run_norm
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.rope import HeadNorms, rope_write
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.gpu.sums import Sums
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.segments import Segments


class _Group:
    """One of the layer's groups of linears."""

    def __init__(self, linear: Linear, gated: bool = False) -> None:
        self.deltas: GpuLinearDeltas = linear.deltas
        self.base = cast(GpuLinear, linear.base)
        self.gated = gated

    def planned(self, segments: Segments) -> StepPlan | None:
        return self.deltas.planned(segments, self.base, self.gated)

    def wanted(self, tokens: int, plan: StepPlan | None) -> Wanted:
        return self.deltas.wanted(tokens, self.base, plan, gated=self.gated)

    def run(
        self,
        x: Tensor | Inputs,
        plan: StepPlan | None,
        output: Output | None = None,
        sums: Sums | None = None,
    ) -> Tensor:
        return self.deltas.run(x, self.base, plan, output=output, sums=sums)


class GpuLayer:
    """A `DecoderLayer`. Its groups share a workspace."""

    def __init__(self, parts: LayerParts, workspace: Workspace) -> None:
        self.parts = parts
        self.workspace = workspace
        self.qkv, self.o, self.down = (_Group(parts.linears[i]) for i in (0, 1, 3))
        self.up = _Group(parts.linears[2], gated=True)

    @staticmethod
    def takes(parts: LayerParts) -> bool:
        """Whether the layer's gate and up are two modules, or one, which the epilogue activates."""
        return can_gate(parts.linears[2].deltas.group.out_features)

    def run(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        step: AttentionStep,
        segments: Segments,
        beside: Beside | None = None,
    ) -> Tensor:
        """See `DecoderLayer`. x, rotation: contiguous. cache: as in `attention.blocks`."""
        assert isinstance(step, GpuStep)
        parts, tokens = self.parts, len(x)
        first, second = parts.norms
        plans = [g.planned(segments) for g in (self.qkv, self.o, self.up, self.down)]
        qkv = self.qkv.run(self._norm(first, x, self.qkv, plans[0], segments), plans[0])
        norms = self._head_norms(segments)
        rope_write(qkv, parts.heads, *rotation, *cache, step.cells, norms)
        want = self.o.wanted(tokens, plans[1])
        sums = self._sums(want, sum_step(parts.dim, want.step_of_x) if want.step_of_x else 0)
        mixed = self._attend(qkv, cache, step, sums, beside)
        h = self.o.run(mixed, plans[1], Output(residual=x), sums)
        want = self.down.wanted(tokens, plans[3])
        sums = self._sums(want, min(want.step_of_x, self._rows(tokens)))
        gated = Output(activation="silu", sums=sums)
        act = self.up.run(self._norm(second, h, self.up, plans[2], segments), plans[2], gated)
        return self.down.run(act, plans[3], Output(residual=h, y=h), sums)

    def _norm(
        self, norm: Norm, x: Tensor, group: _Group, plan: StepPlan | None, segments: Segments
    ) -> Inputs | Tensor:
        deltas = cast(GpuNormDeltas, norm.deltas)
        want = group.wanted(len(x), plan)
        ordered = want.order is not None
        inputs = run_norm(
            x,
            norm.gain,
            norm.eps,
            self.workspace,
            offset=norm.offset,
            tuned=deltas.planned(segments),
            following=None if ordered else Following(want, plan, group.deltas.arena),
        )
        return inputs.x if ordered else inputs

    def _head_norms(self, segments: Segments) -> HeadNorms | None:
        if self.parts.head_norms is None:
            return None
        query, key = self.parts.head_norms
        own, other = (cast(GpuNormDeltas, n.deltas).planned(segments) for n in (query, key))
        assert (own is None) == (other is None), "norms of a layer must be planned together"
        tuned = None if own is None or other is None else (own, other)
        return HeadNorms(query.gain, key.gain, query.eps, query.offset, tuned)

    def _attend(
        self,
        qkv: Tensor,
        cache: tuple[Tensor, Tensor],
        step: GpuStep,
        sums: Sums | None,
        beside: Beside | None,
    ) -> Tensor:
        """[T, heads * dim]."""
        parts, how = self.parts, self.parts.how
        query = qkv.view(len(qkv), -1, parts.dim)[:, : parts.heads]
        out = paged_attention(
            query, *cache, step.tables, how.scale, how.window, how.softcap, how.sinks, sums=sums
        )
        mixed = out.view(len(qkv), -1)
        if beside is not None:
            rows = beside(out, query.transpose(0, 1))
            if sums is not None:
                pieces = mixed[rows].float().view(len(rows), -1, sums.step).sum(-1)
                used = sums.values[: pieces.shape[1] * sums.padded]
                used.view(-1, sums.padded)[:, rows] = pieces.T
        return mixed

    def _sums(self, want: Wanted, step: int) -> Sums | None:
        """A place for sums over so many columns; None if none are wanted."""
        if not step:
            return None
        size = -(-want.width // step) * want.padded
        return Sums(self.workspace.take("given", size), step, want.padded)

    def _rows(self, tokens: int) -> int:
        """Columns of the activation that one program makes."""
        return tile_rows(choose(self.up.base.weights, tokens, True), True)
