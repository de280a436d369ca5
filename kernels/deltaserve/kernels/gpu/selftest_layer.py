"""A decoder layer as `GpuLayer` runs it against its meaning in float64: small, with weights, heads
and rotations of the kind of the model's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from deltaserve.kernels.attention import reference
from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.step import How, Span
from deltaserve.kernels.decoder import LayerParts, Linear, Norm
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.form import Form, as_read
from deltaserve.kernels.gpu.layer import GpuLayer
from deltaserve.kernels.gpu.layer_variants import LayerSpec, spec_of_layer
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.variants import GroupSpec
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.lowrank.reference import delta as lowrank_delta
from deltaserve.kernels.primitives import LowRank, Replace, Scale
from deltaserve.kernels.segments import Segments

HIDDEN, INNER, HEADS, KV_HEADS, RANK, EPS = 128, 192, 2, 1, 8, 1e-5
LORA, SCALES = 1, 2
"""Slots: LoRA everywhere with tuned norms; scales of every linear's inputs."""


def layer_specs(specs: Collection[LayerSpec], dtype: torch.dtype) -> list[LayerSpec]:
    """What is tested for layers of a model, for its kernels to be compiled."""
    return [SmallLayer(spec, dtype, torch.device("cpu")).spec for spec in specs]


class SmallLayer:
    """Random, of the kind of `like`. normed: its norms, then those of heads' queries and keys."""

    def __init__(self, like: LayerSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.like, self.dtype, self.device = like, dtype, device
        self.space = Workspace(device)
        self.lora: list[list[LowRank]] = []
        self.scales: list[Tensor] = []
        self.gains: list[Tensor] = []
        self.tuned: list[Tensor] = []
        dim = like.dim
        qkv = (HEADS * dim, KV_HEADS * dim, KV_HEADS * dim)
        sizes = ((HIDDEN, qkv), (qkv[0], (HIDDEN,)), (HIDDEN, (INNER, INNER)), (INNER, (HIDDEN,)))
        linears = [
            self._linear(spec, inner, outs if len(spec.parts) == len(outs) else (sum(outs),))
            for spec, (inner, outs) in zip(like.groups, sizes, strict=True)
        ]
        norms = [self._norm(n) for n in (HIDDEN, HIDDEN, *((dim, dim) if like.head_norms else ()))]
        window, softcap = 7 if like.windowed else None, 20.0 if like.softcap else None
        self.parts = LayerParts(
            (norms[0], norms[1]),
            (linears[0], linears[1], linears[2], linears[3]),
            HEADS,
            KV_HEADS,
            dim,
            How(dim**-0.5, window, softcap, None),
            (norms[2], norms[3]) if like.head_norms else None,
        )
        self.layer = GpuLayer(self.parts, self.space)
        self.spec = spec_of_layer(self.layer, like.turned, like.block_size)

    def results(self, tokens: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(what, as found, as expected in float64), of a step that decodes `tokens` sequences and
        of one in which half of its tokens are a prompt."""
        size = self.like.block_size
        half = tokens // 2
        steps = {"decoding": [1] * tokens, "with a prompt": [*[1] * (tokens - half), half]}
        for what, counts in steps.items():
            spans, block = [], 0
            for i, count in enumerate(counts):
                held = -(-(i % (2 * size) + count) // size)
                spans.append(Span(i % (2 * size), count, range(block, block + held)))
                block += held
            slots = [(), ((LORA, 1.0),), ((SCALES, 1.0),)]
            third = tokens // 3
            segments = Segments.of([slots[min(i // third, 2)] for i in range(tokens)])
            step = GpuStep.of(spans, size, self.device)
            shape = block, size, KV_HEADS, self.like.dim
            cache = torch.randn(*shape).to(self.dtype), torch.randn(*shape).to(self.dtype)
            x = (5 * torch.randn(tokens, HIDDEN)).to(self.dtype)
            angles = 3 * torch.rand(tokens, self.like.turned // 2).repeat(1, 2)
            turns = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
            want = self.expected(x.double(), turns, cache, step, len(spans), segments)
            found = self.layer.run(
                x.to(self.device),
                (turns[0].to(self.device), turns[1].to(self.device)),
                (cache[0].to(self.device), cache[1].to(self.device)),
                step,
                segments,
            ).cpu()
            names = ("the base", "LoRA and tuned norms", "scaled inputs")
            for i, name in enumerate(names):
                rows = slice(i * third, tokens if i == 2 else (i + 1) * third)
                yield f"{what}, {name}", found[rows], want[rows]

    def expected(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        step: GpuStep,
        spans: int,
        segments: Segments,
    ) -> Tensor:
        """As `GpuLayer.run`, in float64 on the host."""
        slots = [0] * len(x)
        for start, end, mix in segments.runs:
            slots[start:end] = [mix[0][0]] * (end - start)
        lora = torch.tensor([slot == LORA for slot in slots])
        scaled = torch.tensor([slot == SCALES for slot in slots])
        dim, size = self.like.dim, self.like.block_size
        qkv = self._served(0, self._normed(0, x, lora), lora, scaled).view(len(x), -1, dim)
        query, key, value = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], 1)
        if self.like.head_norms:
            query, key = self._normed(2, query, lora), self._normed(3, key, lora)
        cosine, sine = (t.double()[:, None] for t in turns)
        keys, values = (t.double().flatten(0, 1) for t in cache)
        cells, tables = step.cells.cpu(), step.tables
        keys[cells], values[cells] = _turned(key, cosine, sine), value
        how = self.parts.how
        mixed = reference.paged_attention(
            _turned(query, cosine, sine), keys, values, tables.query_start[: spans + 1].cpu(),
            tables.lengths[:spans].cpu(), tables.tables.cpu(), size, how.scale, how.window,
            how.softcap,
        )  # fmt: skip
        h = x + self._served(1, mixed.reshape(len(x), -1), lora, scaled)
        gate, up = self._served(2, self._normed(1, h, lora), lora, scaled).chunk(2, 1)
        return h + self._served(3, silu(gate) * up, lora, scaled)

    def _served(self, i: int, x: Tensor, lora: Tensor, scaled: Tensor) -> Tensor:
        base = cast(GpuLinear, self.parts.linears[i].base)
        assert base.bias is not None
        inputs = torch.where(scaled[:, None], x * self.scales[i].double(), x)
        y = as_read(base, inputs) @ base.weight().cpu().double().T + base.bias.cpu().double()
        added = torch.cat([lowrank_delta(p, x) for p in self.lora[i]], 1)
        return torch.where(lora[:, None], y + added, y)

    def _normed(self, i: int, x: Tensor, lora: Tensor) -> Tensor:
        tuned = lora.view(-1, *[1] * (x.dim() - 1))
        gain = torch.where(tuned, self.tuned[i].double(), self.gains[i].double())
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain

    def _linear(self, like: GroupSpec, inner: int, outs: Sequence[int]) -> Linear:
        base = Form.of(like).linear(outs, inner, self.dtype, self.device)
        deltas = GpuLinearDeltas(inner, outs, self.dtype, device=self.device, workspace=self.space)
        self.lora.append([
            LowRank(torch.randn(RANK, inner) / inner**0.5, torch.randn(out, RANK) / RANK**0.5, 0.5)
            for out in outs
        ])  # fmt: skip
        self.scales.append(0.5 + torch.rand(inner))
        scale = Scale(input=self.scales[-1])
        deltas.install(LORA, deltas.prepare({i: (p,) for i, p in enumerate(self.lora[-1])}))
        deltas.install(SCALES, deltas.prepare({i: (scale,) for i in range(len(outs))}))
        return Linear(deltas, base)

    def _norm(self, width: int) -> Norm:
        gain, tuned = ((0.5 + torch.rand(width)).to(self.dtype).float() for _ in range(2))
        deltas = GpuNormDeltas(width, self.dtype, self.device)
        deltas.install(LORA, deltas.prepare((Replace(tuned),)))
        self.gains.append(gain)
        self.tuned.append(tuned)
        return Norm(gain.to(self.device, self.dtype), EPS, 0.0, deltas)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embeddings (Su et al. 2021), the halves of what is turned paired."""
    half = cosine.shape[-1] // 2
    head, tail = x[..., : 2 * half], x[..., 2 * half :]
    other = torch.cat((-head[..., half:], head[..., :half]), -1)
    return torch.cat((head * cosine + other * sine, tail), -1)
