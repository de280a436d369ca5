"""The GPU's decoder layer: beside float64, by its launches, and that a row is its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from kernel_oracle import in_8_bits, random_primitive, relative_error, served
from torch import Tensor

from deltaserve.kernels.attention import gpu as attention
from deltaserve.kernels.attention import reference
from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.step import How, Span
from deltaserve.kernels.decoder import LayerParts, Linear, Norm
from deltaserve.kernels.gpu import aux, gemm, inputs, norm, rope
from deltaserve.kernels.gpu.base import GpuLinear, make_linear
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.layer import GpuLayer
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.sums import Sums
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.primitives import Bias, Primitive, Replace, Scale
from deltaserve.kernels.segments import Segments

DEVICE = default_device()
HIDDEN, INNER, HEADS, KV_HEADS, DIM, BLOCK = 160, 200, 4, 2, 32, 4
QKV = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
SHAPES = ((HIDDEN, QKV), (HEADS * DIM, (HIDDEN,)))
EPS = 1e-5
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
ROUGH = {torch.float32: 5e-3, torch.bfloat16: 4e-2}
"""Where inputs are rounded to 8 bits: what differs by a rounding may round to the next number."""
Group = Mapping[int, Sequence[Primitive]]
"""Of one module: slot -> primitives."""

DECODES = [
    Span(9, 1, [3, 0, 5]),
    Span(2, 1, [1]),
    Span(0, 1, [6]),
    Span(5, 1, [2, 7]),
    Span(3, 1, [4]),
]
PROMPTS = [*DECODES[:3], Span(4, 2, [2, 7])]
LONG = [Span(130, 1, range(33))]
MIXED = Segments([(1, 2, ((1, 1.0),)), (2, 3, ((2, 0.5), (1, 0.5))), (4, 5, ((3, 1.0),))], 5)


class LayerRig:
    """A layer with random weights and adapters. kinds: slot -> families, on every module. joined:
    gate and up are one module."""

    def __init__(
        self,
        dtype: torch.dtype,
        quantize: str = "none",
        kinds: Mapping[int, Sequence[str]] | None = None,
        *,
        head_norms: bool = False,
        tuned: bool = False,
        turned: int = DIM,
        window: int | None = None,
        group: int = 128,
        joined: bool = False,
        ordered: bool = False,
        activations: str = "float",
    ) -> None:
        self.dtype, self.group, self.ordered = dtype, group, ordered
        self.activations = activations
        self.tolerance = ROUGH[dtype] if activations == "int8" else TOLERANCE[dtype]
        self.read = partial(in_8_bits, dtype=dtype) if activations == "int8" else Tensor.double
        gate_up = (HIDDEN, (2 * INNER,) if joined else (INNER, INNER))
        self.shapes = (*SHAPES, gate_up, (INNER, (HIDDEN,)))
        self.space = Workspace(DEVICE)
        self.adapters: list[list[dict[int, tuple[Primitive, ...]]]] = []
        linears = tuple(self._linear(i, quantize, kinds or {}) for i in range(4))
        self.norms: list[tuple[Tensor, dict[int, tuple[Primitive, ...]]]] = []
        first, second = self._norm(HIDDEN, tuned), self._norm(HIDDEN, tuned)
        own = (self._norm(DIM, tuned), self._norm(DIM, tuned)) if head_norms else None
        self.how = How(0.3, window, None, None)
        parts = LayerParts((first, second), linears, HEADS, KV_HEADS, DIM, self.how, own)  # type: ignore[arg-type]
        assert GpuLayer.takes(parts)
        self.parts = parts
        self.layer = GpuLayer(parts, self.space)
        self.cache = tuple(self.draw(33, BLOCK, KV_HEADS, DIM) for _ in range(2))
        angles = torch.rand(len(DECODES), turned // 2).repeat(1, 2)
        self.rotation = tuple(t.to(DEVICE, dtype) for t in (angles.cos(), angles.sin()))

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(DEVICE, self.dtype)

    def run(self, x: Tensor, spans: Sequence[Span], segments: Segments, **how: Any) -> Tensor:
        """Over a copy of the cache."""
        step = GpuStep.of(spans, BLOCK, DEVICE)
        keys, values = (t.clone() for t in self.cache)
        cosine, sine = self.rotation
        rotation = cosine[: len(x)].contiguous(), sine[: len(x)].contiguous()
        return self.layer.run(x, rotation, (keys, values), step, segments, **how)

    def expected(self, x: Tensor, spans: Sequence[Span], segments: Segments) -> Tensor:
        """float64."""
        step = GpuStep.of(spans, BLOCK, DEVICE)
        h = x.double().cpu()
        qkv = self.linear(0, self.normed(0, h, segments), segments).view(len(x), -1, DIM)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        if self.parts.head_norms:
            q, k = self.normed(2, q, segments), self.normed(3, k, segments)
        cosine, sine = (t.double().cpu()[: len(x), None] for t in self.rotation)
        keys, values = (t.double().cpu().flatten(0, 1) for t in self.cache)
        keys[step.cells.cpu()], values[step.cells.cpu()] = turn(k, cosine, sine), v
        t, n = step.tables, len(spans)
        start, lengths = t.query_start[: n + 1].cpu(), t.lengths[:n].cpu()
        mixed = reference.paged_attention(
            turn(q, cosine, sine), keys, values, start, lengths, t.tables.cpu(), BLOCK,
            self.how.scale, window=self.how.window,
        )  # fmt: skip
        h = h + self.linear(1, mixed.view(len(x), -1), segments)
        gate, up = self.linear(2, self.normed(1, h, segments), segments).split(INNER, 1)
        return h + self.linear(3, torch.nn.functional.silu(gate) * up, segments)

    def linear(self, i: int, x: Tensor, segments: Segments) -> Tensor:
        base: Any = self.parts.linears[i].base
        weight, found, start = base.weight().cpu(), [], 0
        for part, out in enumerate(self.shapes[i][1]):
            rows = slice(start, start + out)
            own = {slot: modules[part] for slot, modules in enumerate(self.adapters[i]) if modules}
            bias = base.bias[rows].cpu()
            found.append(served(x, weight[rows], bias, own, segments, self.read))
            start += out
        return torch.cat(found, 1)

    def normed(self, i: int, x: Tensor, segments: Segments) -> Tensor:
        """x: [T, ..., n]."""
        gain, own = self.norms[i]
        y = torch.empty_like(x)
        for row in range(len(x)):
            mix = next((m for start, end, m in segments.runs if start <= row < end), ())
            total, bias = gain.double().cpu(), torch.zeros(len(gain)).double()
            for p, w in ((p, w) for slot, w in mix for p in own.get(slot, ())):
                if isinstance(p, Bias):
                    bias += w * p.bias.double()
                else:
                    assert isinstance(p, Replace)
                    total = total + w * (p.weight.double() - gain.double().cpu())
            r = (x[row].pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
            y[row] = x[row] * r * total + bias
        return y

    def _linear(self, i: int, quantize: str, kinds: Mapping[int, Sequence[str]]) -> Linear:
        inner, outs = self.shapes[i]
        weight = torch.randn(sum(outs), inner) / inner**0.5
        bias = 0.1 * torch.randn(sum(outs))
        base = make_linear(
            weight, bias, dtype=self.dtype, quantize=quantize, group_size=self.group,
            activations=self.activations,
        )  # fmt: skip
        if self.ordered:
            held = {**base.held(), "order": torch.randperm(inner)}
            base = GpuLinear(held, base.format, self.dtype, base.group_size)
        deltas = GpuLinearDeltas(inner, outs, self.dtype, workspace=self.space)
        own: list[dict[int, tuple[Primitive, ...]]] = [{} for _ in range(5)]
        for slot, families in kinds.items():
            for part, out in enumerate(outs):
                drawn = tuple(random_primitive(k, out, inner) for k in families)
                own[slot][part] = tuple(_gentle(p) for p in drawn)
            deltas.install(slot, deltas.prepare(own[slot]))
        self.adapters.append(own)
        return Linear(deltas, base)

    def _norm(self, size: int, tuned: bool) -> Norm:
        gain = (1 + 0.3 * torch.randn(size)).to(DEVICE, self.dtype)
        deltas, own = GpuNormDeltas(size, self.dtype), {}
        if tuned:
            own = {1: (Replace(torch.rand(size)),), 3: (Bias(torch.rand(size)),)}
        for slot, primitives in own.items():
            deltas.install(slot, deltas.prepare(primitives))
        self.norms.append((gain, own))
        return Norm(gain, EPS, 0.0, deltas)


def _gentle(p: Primitive) -> Primitive:
    """Input factors near 1, apart for every module."""
    return Scale(input=1 + (p.input - 1) / 2) if isinstance(p, Scale) and p.input is not None else p


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    turned = cosine.shape[-1]
    head, tail = x[..., :turned], x[..., turned:]
    half = torch.cat((-head[..., turned // 2 :], head[..., : turned // 2]), -1)
    return torch.cat((head * cosine + half * sine, tail), -1)


FAMILIES = {1: ("low",), 2: ("bit", "input", "csr"), 3: ("low", "output")}
CASES = [
    (torch.float32, "none", DECODES, {}),
    (torch.float32, "int8", PROMPTS, {"tuned": True, "window": 4}),
    (torch.bfloat16, "int4", DECODES, {"head_norms": True, "tuned": True}),
    (torch.float16, "int4", PROMPTS, {"turned": 16, "group": 32, "joined": True}),
    (torch.bfloat16, "fp8", PROMPTS, {"head_norms": True}),
    (torch.bfloat16, "int4", PROMPTS, {"ordered": True, "tuned": True, "group": 16}),
    (torch.float32, "int4", DECODES, {"activations": "int8", "tuned": True, "group": 64}),
    (torch.bfloat16, "int8", PROMPTS, {"activations": "int8", "joined": True}),
]


@pytest.mark.parametrize(("dtype", "quantize", "spans", "how"), CASES)
def test_a_layer(dtype: torch.dtype, quantize: str, spans: Sequence[Span], how: Any) -> None:
    """Twice over memory that holds NaN; base rows are bit for bit what they are alone."""
    rig = LayerRig(dtype, quantize, FAMILIES, **how)
    x = rig.draw(5, HIDDEN)
    given, alone = x.clone(), rig.run(x, spans, Segments([], 5))
    assert relative_error(alone.cpu(), rig.expected(x, spans, Segments([], 5))) < rig.tolerance
    for _ in range(2):
        rig.space.poison()
        y = rig.run(x, spans, MIXED)
        assert relative_error(y.cpu(), rig.expected(x, spans, MIXED)) < rig.tolerance
        assert torch.equal(y[[0, 3]], alone[[0, 3]]) and torch.equal(x, given)
    for row in (1, 2, 4):
        assert not torch.equal(y[row], alone[row])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched, in order."""
    found: list[str] = []
    for module in (attention, aux, gemm, inputs, norm, rope):
        real = module.launch

        def launch(kernel: Any, *rest: Any, real: Any = real, **options: Any) -> None:
            found.append(kernel.fn.__name__)
            real(kernel, *rest, **options)

        monkeypatch.setattr(module, "launch", launch)
    return found


BASE = [
    "norm_kernel", "gemm_kernel", "rope_kernel", "decode_kernel", "gemm_kernel", "norm_kernel",
    "gemm_kernel", "gemm_kernel",
]  # fmt: skip
SPLIT = [*BASE[:4], "reduce_kernel", *BASE[4:]]


def adapted(base: Sequence[str]) -> list[str]:
    """With a launch more for every group of linears."""
    return [k for b in base for k in ((b,) if b != "gemm_kernel" else ("aux_kernel", b))]


@pytest.mark.parametrize(
    "quantize, dtype, joined", [("int4", torch.bfloat16, False), ("none", torch.float32, True)]
)
def test_launches(quantize: str, dtype: torch.dtype, joined: bool, launched: list[str]) -> None:
    """Eight or nine of the base, twelve or thirteen with adapters, whatever mix and weights."""
    kinds = {1: ("low",), 2: ("low", "output", "bias"), 3: ("rows", "replace")}
    rig = LayerRig(dtype, quantize, kinds, tuned=True, head_norms=True, joined=joined)
    x = rig.draw(5, HIDDEN)
    for spans, segments, expected in (
        (DECODES, Segments([], 5), BASE),
        (DECODES, MIXED, adapted(BASE)),
        (LONG, Segments([], 1), SPLIT),
        (LONG, Segments([(0, 1, ((2, 0.5), (3, 0.5)))], 1), adapted(SPLIT)),
    ):
        launched.clear()
        y = rig.run(x[: segments.tokens], spans, segments)
        assert launched == expected
        want = rig.expected(x[: segments.tokens], spans, segments)
        assert relative_error(y.cpu(), want) < TOLERANCE[dtype]
    assert (len(BASE), len(SPLIT), len(adapted(BASE)), len(adapted(SPLIT))) == (8, 9, 12, 13)
    launched.clear()
    rig.run(x, PROMPTS, Segments([], 5))
    assert Counter(launched) == Counter([*BASE, "prefill_kernel"])


def test_what_attention_leaves_out_costs_a_launch(launched: list[str]) -> None:
    """1-bit and sparse deltas and scaled inputs on o and down; qkv, gate and up have the norms."""
    rig = LayerRig(torch.bfloat16, "int4", FAMILIES)
    rig.run(rig.draw(5, HIDDEN), DECODES, MIXED)
    assert launched.count("inputs_kernel") == 2 and len(launched) == 14


def test_the_norms_quantize_what_they_make(launched: list[str]) -> None:
    """What attention and the gated product make is quantized in a launch of its own."""
    rig = LayerRig(torch.bfloat16, "int4", {1: ("low",)}, activations="int8")
    x = rig.draw(5, HIDDEN)
    rig.run(x, DECODES, Segments([], 5))
    assert launched == [*BASE[:4], "quantize_kernel", *BASE[4:7], "quantize_kernel", BASE[7]]
    launched.clear()
    rig.run(x, DECODES, Segments([(0, 2, ((1, 1.0),))], 5))
    assert launched.count("quantize_kernel") == 2 and len(launched) == 14


def test_rows_changed_beside_attention_have_sums_of_their_own() -> None:
    rig = LayerRig(torch.bfloat16, "int4")
    x, rows = rig.draw(5, HIDDEN), torch.tensor([1, 4], device=DEVICE)
    added = rig.draw(2, HEADS, DIM)
    seen: list[Tensor] = []

    def beside(out: Tensor, query: Tensor) -> Tensor:
        seen.append(query)
        out[rows] += added
        return rows

    y = rig.run(x, DECODES, Segments([], 5), beside=beside)
    alone = rig.run(x, DECODES, Segments([], 5))
    assert seen[0].shape == (HEADS, 5, DIM)
    assert torch.equal(y[[0, 2, 3]], alone[[0, 2, 3]])
    wide = added.double().cpu().view(2, -1) @ rig.parts.linears[1].base.weight().double().cpu().T
    rig.layer.down.run = lambda act, plan, output, sums: output.residual  # type: ignore[method-assign, assignment, return-value]
    h, other = (rig.run(x, DECODES, Segments([], 5), beside=b).clone() for b in (beside, None))
    assert relative_error((h - other)[rows].cpu(), wide) < 2e-2


def test_sums_that_do_not_fit_are_refused() -> None:
    sums = Sums(torch.zeros(99, device=DEVICE), 24, 16)
    with pytest.raises(ValueError, match="over columns of one part"):
        gemm.Output(sums=sums).check((8, 8))
    rig = LayerRig(torch.bfloat16, "int4")
    down = rig.layer.down
    with pytest.raises(ValueError, match="sums over 24 columns of 16 tokens"):
        down.run(rig.draw(5, INNER), None, sums=sums)
