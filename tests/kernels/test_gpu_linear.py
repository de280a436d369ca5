"""The GPU's mixed batch: every family, dtype, odd size and mix of one group, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_rig import DTYPES, MIXED, GpuRig
from kernel_oracle import FAMILIES, random_primitive, relative_error

from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.config import GemmConfig
from deltaserve.kernels.gpu.gemm import Output
from deltaserve.kernels.primitives import (
    LowRank,
    Primitive,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
)
from deltaserve.kernels.segments import EMPTY, Mix, Segments


def lowrank(rank: int, out: int, inner: int) -> LowRank:
    return LowRank(torch.randn(rank, inner) / inner**0.5, torch.randn(out, rank) / rank**0.5, 0.7)


SIZES = [
    (37, (100,), torch.float32),
    (100, (133, 37, 37), torch.float16),
    (256, (128, 64), torch.bfloat16),
]


@pytest.mark.parametrize("inner, outs, dtype", SIZES, ids=str)
@pytest.mark.parametrize("kind", (*FAMILIES, "replace_rows", "gated"))
def test_family(kind: str, inner: int, outs: tuple[int, ...], dtype: torch.dtype) -> None:
    adapters = {
        slot: {
            part: (random_primitive(kind, out, inner, rank=rank),)
            for part, out in enumerate(outs)
            if (slot + part) % 3
        }
        for slot, rank in ((1, 1), (2, 64), (3, 7))
    }
    GpuRig(inner, outs, dtype, adapters).check(MIXED)


@pytest.mark.parametrize(
    "quantize, group, dtype, activations",
    [
        ("int4", 32, torch.bfloat16, "float"),
        ("int4", 256, torch.float16, "float"),
        ("int8", 0, torch.bfloat16, "float"),
        ("fp8", 0, torch.float16, "float"),
        ("int4", 64, torch.float32, "int8"),
        ("int8", 0, torch.bfloat16, "int8"),
    ],
    ids=str,
)
def test_families_together(
    quantize: str,
    group: int,
    dtype: torch.dtype,
    activations: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every kind in one batch, several in one adapter and several adapters on one token, over each
    kind of base, with the instructions that a GPU runs."""
    monkeypatch.setattr(device, "packs", lambda: True)
    inner, outs = 160, (70, 60)
    kinds = {
        1: ("low", "csr", "output"),
        2: ("bit", "bias", "rows", "output"),
        3: ("replace", "low", "blocks", "cols"),
        4: ("gated", "low", "bit", "gated"),
    }
    adapters = {
        slot: {
            p: tuple(random_primitive(k, out, inner) for k in names) for p, out in enumerate(outs)
        }
        for slot, names in kinds.items()
    }
    runs = [*MIXED.runs, (38, 39, ((4, 1.0),)), (40, 61, ((4, 0.5), (3, 0.5)))]
    rig = GpuRig(
        inner, outs, dtype, adapters, quantize=quantize, group_size=group, activations=activations
    )
    rig.check(Segments(runs, 61))


@pytest.mark.parametrize("tokens", (1, 2, 3, 8, 9, 16, 17, 33, 64, 65, 130, 256))
def test_numbers_of_tokens(tokens: int) -> None:
    """Ranks of 1 to 256 side by side, a run for each; every bucket of tokens."""
    inner, outs = 72, (40, 24)
    ranks = (1, 3, 8, 16, 24, 100, 256)
    adapters = {
        slot: {p: (lowrank(rank, out, inner),) for p, out in enumerate(outs) if slot != 2 or p}
        for slot, rank in enumerate(ranks)
    }
    mixes: list[Mix] = []
    for i in range(tokens):
        slot = i * 8 // tokens
        other = ((slot, 0.5), (6, -0.25)) if i % 29 == 0 else ((slot, 1.0),)
        mixes.append(() if slot == 7 else other)
    GpuRig(inner, outs, torch.float32, adapters, quantize="int8").check(Segments.of(mixes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_as_older_gpus_unpack_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "arch", lambda _: 80)
    adapters = {1: {0: (random_primitive("bit", 70, 300, 2),)}}
    GpuRig(300, (70,), dtype, adapters).check(Segments([(1, 4, ((1, 1.0),))], 5))


def test_input_scale_beside_replacement() -> None:
    adapters: dict[int, dict[int, tuple[Primitive, ...]]] = {
        1: {0: (random_primitive("input", 33, 40),), 1: (random_primitive("input", 20, 40),)},
        2: {0: (random_primitive("replace", 33, 40),)},
        3: {0: (random_primitive("output", 33, 40),), 1: (random_primitive("low", 20, 40),)},
    }
    rig = GpuRig(40, (33, 20), torch.float32, adapters)
    runs = [
        (0, 2, ((1, 1.0), (2, 0.5))),
        (3, 4, ((2, 1.0), (3, 0.5))),
        (4, 9, ((1, 0.5),)),
        (9, 12, ((2, -0.5),)),
    ]
    rig.check(Segments(runs, 13))


def test_one_input_for_all_parts_is_scaled_once() -> None:
    factor = random_primitive("input", 33, 40)
    assert isinstance(factor, Scale)
    adapters = {1: {0: (factor,), 1: (Scale(input=factor.input),)}}
    rig = GpuRig(40, (33, 20), torch.float32, adapters)
    segments = Segments([(1, 3, ((1, 0.5),))], 4)
    assert not rig.deltas.plan(segments, rig.base).uses.apart
    rig.check(segments)


@pytest.mark.parametrize("height, width", [(64, 64), (16, 32), (128, 128), (8, 16), (5, 7)])
def test_blocks_of_any_size(height: int, width: int) -> None:
    """Large ones are panels, small ones single entries."""
    out, inner = height * max(2, 320 // height), width * max(2, 256 // width)
    every = torch.cartesian_prod(torch.arange(out // height), torch.arange(inner // width))
    index = every[torch.randperm(len(every))[: 3 + len(every) // 60]]
    blocks = SparseBlocks(index, torch.randn(len(index), height, width) / inner**0.5)
    GpuRig(inner, (out,), torch.float32, {1: {0: (blocks,)}}).check(MIXED)


def test_empty_primitives() -> None:
    out, inner = 70, 64
    none = torch.zeros(0, dtype=torch.int64)
    adapters: dict[int, dict[int, tuple[Primitive, ...]]] = {
        1: {
            0: (
                SparseCsr(torch.zeros(out + 1, dtype=torch.int64), none.int(), torch.zeros(0)),
                SparseRows(none, torch.zeros(0, inner)),
                SparseCols(none, torch.zeros(out, 0)),
            )
        }
    }
    GpuRig(inner, (out,), torch.float32, adapters).check(Segments([(0, 3, ((1, 1.0),))], 4))


@pytest.mark.parametrize("activation", ("silu", "gelu_tanh"))
@pytest.mark.parametrize("outs, split", [((128, 128), 1), ((128, 128), 3), ((256,), 1)])
@pytest.mark.parametrize("quantize", ("int4", "none"))
def test_activation_and_residual(
    quantize: str, outs: tuple[int, ...], split: int, activation: str
) -> None:
    """Of gate and up apart, and of one module that is both."""
    inner, kinds = 384, ("low", "bit", "csr", "output", "bias")
    adapters = {
        slot: {
            p: tuple(random_primitive(k, out, inner, 5 + slot) for k in kinds)
            for p, out in enumerate(outs)
        }
        for slot in (1, 2)
    }
    rig = GpuRig(inner, outs, torch.float32, adapters, quantize=quantize)
    segments = Segments([(0, 3, ((1, 1.0),)), (5, 9, ((2, 0.5), (1, 0.5)))], 10)
    config = GemmConfig(16, 128, 64, split, "after")
    plan = rig.deltas.plan(segments, rig.base, config=config)
    x, residual = rig.x(10), torch.randn(10, 128).to(rig.device)
    gate, up = torch.cat(rig.parts(x, segments), 1).split(128, 1)
    function = torch.nn.functional.silu if activation == "silu" else None
    acted = function(gate) if function else torch.nn.functional.gelu(gate, approximate="tanh")
    for _ in range(2):
        rig.deltas.workspace.poison()
        y = rig.deltas.run(x, rig.base, plan, config=config, output=Output(activation, residual))
        assert relative_error(y.cpu(), acted * up + residual.cpu().double()) < 3e-6


def test_what_an_activation_cannot_have() -> None:
    rig = GpuRig(64, (32, 16), torch.float32, {})
    x = rig.x(2)
    with pytest.raises(ValueError, match="two equal parts"):
        rig.deltas.run(x, rig.base, None, output=Output("silu"))
    with pytest.raises(ValueError, match="halves of one"):
        Output("silu").check((33,))
    with pytest.raises(ValueError, match='activation is "relu"'):
        rig.deltas.run(x, rig.base, None, output=Output("relu"))


@pytest.mark.parametrize("config", [
    GemmConfig(8, 64, 128, 1, "sums"), GemmConfig(16, 128, 64, 2, "sums"),
    GemmConfig(32, 32, 128, 1, "after", 2), GemmConfig(64, 128, 64, 1, "after", 8),
    GemmConfig(128, 64, 128, 4, "sums", 8),
], ids=str)  # fmt: skip
def test_every_tiling_gives_the_same(config: GemmConfig) -> None:
    inner, outs = 300, (100, 33)
    adapters = {
        s: {p: (lowrank(9 * s, out, inner), random_primitive("bit", out, inner)) for p, out in
            enumerate(outs)}
        for s in (1, 2, 3)
    }  # fmt: skip
    rig = GpuRig(inner, outs, torch.float16, adapters, quantize="int4")
    x = rig.x(MIXED.tokens)
    y = rig.deltas.run(x, rig.base, rig.deltas.plan(MIXED, rig.base, config=config), config=config)
    assert relative_error(y.cpu(), torch.cat(rig.parts(x, MIXED), 1)) < 1e-3


def test_no_tokens_no_runs_no_adapters() -> None:
    rig = GpuRig(37, (100,), torch.float32, {1: {0: (lowrank(2, 100, 37),)}})
    rig.check(EMPTY)
    rig.check(Segments([], 3))
    x = rig.x(4)
    other = rig.deltas.forward(x, rig.base, Segments([(0, 2, ((9, 1.0),))], 4))
    assert relative_error(other.cpu(), torch.cat(rig.parts(x, Segments([], 4)), 1)) < 2e-6


def test_install_remove_reinstall() -> None:
    one, two = lowrank(2, 100, 40), lowrank(50, 100, 40)
    rig = GpuRig(40, (100,), torch.float32, {1: {0: (one,)}, 2: {0: (two,)}})
    segments = Segments([(0, 1, ((1, 1.0),)), (1, 3, ((2, 1.0),))], 4)
    rig.check(segments)
    used = rig.deltas.arena.used
    rig.deltas.remove(1)
    rig.deltas.remove(1)
    assert rig.deltas.arena.used < used and rig.deltas.nbytes > 0
    rig.adapters = {2: {0: (two,)}}
    rig.check(segments)
    rig.deltas.install(1, rig.deltas.prepare({0: (two,)}))
    rig.adapters = {1: {0: (two,)}, 2: {0: (two,)}}
    rig.check(segments)
    rig.deltas.remove(1)
    rig.deltas.remove(2)
    assert rig.deltas.arena.used == rig.deltas.nbytes == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("quantize", ("int8", "int4"))
def test_scaled_inputs_are_quantized_as_scaled(quantize: str, dtype: torch.dtype) -> None:
    """Of each module its own."""
    adapters = {
        1: {0: (random_primitive("input", 33, 40),), 1: (random_primitive("input", 33, 40),)},
        2: {1: (random_primitive("low", 33, 40),)},
    }
    rig = GpuRig(40, (33, 33), dtype, adapters, quantize=quantize, activations="int8")
    segments = Segments([(1, 3, ((1, 1.0), (2, 0.5))), (4, 5, ((1, -1.0),))], 19)
    assert rig.deltas.plan(segments, rig.base).uses.apart
    rig.check(segments)


@pytest.mark.parametrize("activations", ("float", "int8"))
def test_other_tokens_numbers_stay_their_own(activations: str) -> None:
    """A request whose activations overflow spoils nobody else's."""
    adapters = {1: {0: (lowrank(4, 40, 64),)}}
    rig = GpuRig(64, (40,), torch.float32, adapters, quantize="int4", activations=activations)
    segments = Segments([(0, 2, ((1, 1.0),)), (3, 5, ((1, 0.5),))], 6)
    x = rig.x(6)
    good = rig.deltas.forward(x, rig.base, segments)
    x[1] = float("inf")
    y = rig.deltas.forward(x, rig.base, segments)
    rest = [0, 2, 3, 4, 5]
    assert not y[1].isfinite().all() and torch.equal(y[rest], good[rest])
