"""The GPU's RMS norm: beside float64, and beside inputs_kernel for what linears want of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
from gpu_rig import DTYPES, TOLERANCE, GpuRig
from kernel_oracle import random_primitive, relative_error
from torch import Tensor

from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.inputs import Inputs, Wanted, run_inputs
from deltaserve.kernels.gpu.norm import Following, run_norm
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.norm_plans import NormPlans
from deltaserve.kernels.gpu.norm_tables import NormRoom
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.step import StepTooLarge
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.primitives import Bias, LowRank, Primitive, Replace
from deltaserve.kernels.segments import Segments

DEVICE = default_device()
EPS = 1e-5
SEGMENTS = Segments(
    [(0, 2, ((1, 1.0),)), (3, 4, ((2, 0.5), (1, -0.25))), (4, 5, ((3, 2.0),)), (5, 7, ((1, 1.0),))],
    9,
)
SHAPES = [(1, 64), (9, 100), (3, 1000), (9, 384)]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """float64."""
    wide = x.double().cpu()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_norm(dtype: torch.dtype, shape: tuple[int, int], added: bool) -> None:
    x, gain = draw(*shape, dtype=dtype) * 3, draw(shape[1], dtype=dtype)
    residual = draw(*shape, dtype=dtype) if added else None
    total = x if residual is None else x + residual
    y = run_norm(x, gain, EPS, Workspace(DEVICE), residual=residual).x
    assert y.dtype == dtype and torch.equal(x, total)
    torch.testing.assert_close(
        y.double().cpu(), norm(total, gain), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def tuned(hidden: int, dtype: torch.dtype) -> GpuNormDeltas:
    deltas = GpuNormDeltas(hidden, dtype)
    for slot, primitives in adapters(hidden).items():
        deltas.install(slot, deltas.prepare(primitives))
    return deltas


def adapters(hidden: int) -> Mapping[int, tuple[Primitive, ...]]:
    generator = torch.Generator().manual_seed(3)

    def vector() -> Tensor:
        return torch.randn(hidden, generator=generator)

    return {1: (Replace(vector()),), 2: (Bias(vector()), Replace(vector())), 3: (Bias(vector()),)}


def expected(
    x: Tensor, gain: Tensor, segments: Segments, offset: float, slots: Collection[int] = (1, 2, 3)
) -> Tensor:
    """float64. slots: of adapters that are on the norm."""
    want, own = norm(x, gain + offset), adapters(x.shape[1])
    for start, end, mix in segments.runs:
        total, bias = gain.double().cpu(), torch.zeros(x.shape[1]).double()
        for slot, w in mix:
            for p in own[slot] if slot in slots else ():
                if isinstance(p, Bias):
                    bias += w * p.bias.double()
                else:
                    assert isinstance(p, Replace)
                    total = total + w * (p.weight.double() - gain.double().cpu())
        want[start:end] = norm(x[start:end], total + offset) + bias
    return want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gains_and_biases_of_adapters(dtype: torch.dtype, offset: float) -> None:
    x, gain = draw(9, 200, dtype=dtype), draw(200, dtype=dtype)
    deltas = tuned(200, dtype)
    assert deltas.touches(SEGMENTS) and not deltas.touches(Segments([(0, 1, ((7, 1.0),))], 9))
    space, plan = Workspace(DEVICE), deltas.planned(SEGMENTS)
    y = run_norm(x, gain, EPS, space, offset=offset, tuned=plan).x.clone()
    assert relative_error(y.cpu(), expected(x, gain, SEGMENTS, offset)) < TOLERANCE[dtype]
    alone = run_norm(x, gain, EPS, space, offset=offset).x
    base = [2, 7, 8]
    assert torch.equal(y[base], alone[base]) and not torch.equal(y[:2], alone[:2])

    def own(rows: Tensor, other: Tensor | None) -> Tensor:
        gains = gain.float() if other is None else other.float()
        return norm(rows, gains + offset).to(DEVICE, dtype)

    general = deltas.forward(x, own, gain.float(), SEGMENTS)
    assert relative_error(y.cpu(), general.double().cpu()) < TOLERANCE[dtype]


def test_a_plan_is_filled_again() -> None:
    """Of two norms, of which adapters have other vectors, or none."""
    plans, space = NormPlans(Arena(DEVICE)), Workspace(DEVICE)
    both = [GpuNormDeltas(n, torch.float32, plans=plans) for n in (64, 96)]
    given = [(draw(9, d.hidden, dtype=torch.float32), torch.rand(d.hidden)) for d in both]
    for slot in adapters(64):
        for deltas in both if slot == 1 else both[slot % 2 :][:1]:
            deltas.install(slot, deltas.prepare(adapters(deltas.hidden)[slot]))
    memory = StaticMemory(NormRoom(9, 6, 2).count, DEVICE)
    plan = plans.reserve(9, 6, memory)
    for segments in (SEGMENTS, Segments([(8, 9, ((3, 1.0),))], 9), Segments([], 9)):
        assert plans.replan(plan, segments) == bool(segments)
        memory.send()
        for number, (deltas, (x, gain)) in enumerate(zip(both, given, strict=True)):
            gain = gain.to(DEVICE)
            y = run_norm(x, gain, EPS, space, tuned=plan.of(number)).x
            own = {s for s in adapters(64) if s == 1 or s % 2 == number}
            want = expected(x, gain, segments, 0.0, own)
            assert relative_error(y.cpu(), want) < 2e-6
            eager = deltas.planned(segments)
            assert (eager is None) == (not segments)
            assert torch.equal(y, run_norm(x, gain, EPS, space, tuned=eager).x)
    before = plan.staging.clone()
    for runs, what in (
        ([(0, 17, ((3, 1.0),))], "17 tokens"),
        ([(i, i + 1, ((2, i + 1.0), (1, 0.5))) for i in range(3)], "9 vectors"),
    ):
        with pytest.raises(StepTooLarge, match=what):
            plans.replan(plan, Segments(runs, 17))
    assert torch.equal(plan.staging, before)


def test_plans_are_of_what_is_installed() -> None:
    """As long as nothing changes or moves, a step takes the plan of the one before."""
    deltas = tuned(64, torch.float32)
    x, gain = draw(9, 64, dtype=torch.float32), draw(64, dtype=torch.float32)

    def again() -> tuple[Any, Tensor]:
        segments = Segments(SEGMENTS.runs, 9)
        y = deltas.rms(x, gain, 0.0, EPS, segments)
        assert relative_error(y.cpu(), expected(x, gain, segments, 0.0)) < 2e-6
        return deltas.planned(segments), y

    (first, y), (second, _) = again(), again()
    assert first.offsets.data_ptr() == second.offsets.data_ptr()
    deltas.arena.adopt(torch.zeros(1 << 14, dtype=torch.uint8, device=DEVICE))
    moved, same = again()
    assert not torch.equal(moved.offsets, first.offsets) and torch.equal(same, y)
    deltas.install(3, deltas.prepare((Bias(torch.ones(64)),)))
    other = deltas.rms(x, gain, 0.0, EPS, Segments(SEGMENTS.runs, 9))
    rows = [i for i in range(9) if i != 4]
    assert torch.equal(other[rows], y[rows]) and not torch.equal(other[4], y[4])


def test_install_and_remove() -> None:
    deltas = tuned(64, torch.float32)
    assert deltas.nbytes == deltas.arena.used == 4 * 256
    deltas.install(2, deltas.prepare((Bias(torch.ones(64)),)))
    assert deltas.nbytes == 3 * 256
    for slot in (1, 2, 2, 3):
        deltas.remove(slot)
    assert deltas.nbytes == deltas.arena.used == 0 and not deltas.touches(SEGMENTS)
    deltas.install(1, deltas.prepare(()))
    assert deltas.arena.used == 0


KINDS = {
    "none": {},
    "low": {1: ("low",)},
    "scaled": {1: ("input",), 2: ("low",), 3: ("input", "bit")},
    "all": {1: ("input", "csr"), 2: ("bit", "low"), 3: ("csr",)},
}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    "quantize, dtype, activations",
    [
        ("int4", torch.bfloat16, "float"),
        ("int8", torch.float32, "float"),
        ("int8", torch.bfloat16, "int8"),
        ("int4", torch.float16, "int8"),
    ],
)
@pytest.mark.parametrize("inner", [160, 256])
def test_what_linears_want(
    kinds: str, quantize: str, dtype: torch.dtype, activations: str, inner: int
) -> None:
    """What norm_kernel makes is what inputs_kernel makes of the norm, and the linears agree."""
    outs = (70, 60)
    own = {
        slot: {
            p: tuple(random_primitive(k, out, inner) for k in names) for p, out in enumerate(outs)
        }
        for slot, names in KINDS[kinds].items()
    }
    rig = GpuRig(inner, outs, dtype, own, quantize=quantize, group_size=32, activations=activations)
    x, gain = draw(9, inner, dtype=dtype), draw(inner, dtype=dtype)
    plan = rig.deltas.plan(SEGMENTS, rig.base) if own else None
    want = rig.deltas.wanted(9, rig.base, plan)
    assert (want.step > 0) == (quantize == "int4")
    space = rig.deltas.workspace
    for _ in range(2):
        space.poison()
        got = run_norm(x, gain, EPS, space, following=Following(want, plan, rig.deltas.arena))
        normed = got.x.clone()
        y = rig.deltas.run(got, rig.base, plan)
    assert torch.equal(normed, run_norm(x, gain, EPS, Workspace(DEVICE)).x)
    other = Workspace(DEVICE)
    alone = run_inputs(normed, want, plan, rig.deltas.arena, other)
    same(got, alone, want)
    segments = SEGMENTS if own else Segments([], 9)
    assert relative_error(y.cpu(), torch.cat(rig.parts(normed, segments), 1)) < TOLERANCE[dtype]


def same(got: Inputs, alone: Inputs, want: Wanted) -> None:
    """Sums of floats may be taken in another order."""
    assert (got.step, got.tiles, got.tokens, got.apart) == (
        alone.step,
        alone.tiles,
        alone.tokens,
        alone.apart,
    )
    uses, padded = want.uses, want.padded
    sizes = {
        "base": (want.copies if uses.scaled else 1) * got.x.numel(),
        "scales": 0,
        "sums": want.copies * -(-want.width // want.step) * padded if want.step else 0,
        "turned": want.width * padded if uses.turned else 0,
        "biases": -(-want.width // 128) * padded if uses.biased else 0,
    }
    if want.whole:
        sizes |= {"base": want.copies * want.count * -(-want.width // 128) * 128}
        for scales in (i.scales[: want.copies * padded].view(-1, padded) for i in (got, alone)):
            scales[:, want.count :] = 0  # of no token
        sizes["scales"] = want.copies * padded
    for name, size in sizes.items():
        one, two = getattr(got, name).flatten()[:size], getattr(alone, name).flatten()[:size]
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    x, space = draw(3, 64, dtype=torch.float32), Workspace(DEVICE)
    with pytest.raises(ValueError, match="gain is"):
        run_norm(x, torch.ones(32, device=DEVICE), EPS, space)
    with pytest.raises(ValueError, match="residual is"):
        run_norm(x, torch.ones(64, device=DEVICE), EPS, space, residual=x[:2])
    with pytest.raises(ValueError, match="contiguous"):
        run_norm(x.T.contiguous().T, torch.ones(64, device=DEVICE), EPS, space)
    rig = GpuRig(64, (8,), torch.float32, {1: {0: (LowRank(torch.ones(1, 64), torch.ones(8, 1)),)}})
    with pytest.raises(ValueError, match="next linears want"):
        run_norm(
            x,
            torch.ones(64, device=DEVICE),
            EPS,
            space,
            following=Following(rig.deltas.wanted(4, rig.base, None)),
        )
