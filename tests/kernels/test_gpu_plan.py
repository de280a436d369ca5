"""A step's tables at fixed addresses: what a captured graph replays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_rig import GpuRig
from kernel_oracle import random_primitive, relative_error
from torch import Tensor

from deltaserve.kernels.gpu import aux, config
from deltaserve.kernels.gpu.config import GemmConfig, GroupKey
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.step import Limits, StepPlan, StepTooLarge
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group

LIMITS = Limits(
    width=160,
    planes=8,
    items=600,
    pages=64,
    vectors=32,
    entries=32,
    uses=Uses(True, True, True, True),
)

STEPS = {
    "nothing": [],
    "one": [(0, 1, ((1, 1.0),))],
    "all kinds": [
        (0, 2, ((1, 1.0),)),
        (2, 5, ((2, 1.0), (1, 0.5))),
        (5, 6, ((3, 1.0),)),
        (7, 9, ((4, 0.5),)),
        (9, 11, ((5, 1.0), (3, 0.5))),
        (11, 12, ((6, 1.0),)),
    ],
    "every token its own": [(i, i + 1, ((1 + i % 6, 1.0),)) for i in range(12)],
    "all one": [(0, 12, ((2, 1.0),))],
}


def rig() -> GpuRig:
    inner, outs = 128, (70, 64)
    kinds = {1: "low", 2: "bit", 3: "csr", 4: "rows", 5: "output", 6: "input"}
    adapters = {
        slot: {p: (random_primitive(k, out, inner, 3 * slot),) for p, out in enumerate(outs)}
        for slot, k in kinds.items()
    }
    return GpuRig(inner, outs, torch.float32, adapters, quantize="int8")


def addresses(plan: StepPlan) -> list[int]:
    return [plan.buffer.data_ptr(), *(t.data_ptr() for t in plan.tables.values())]


def test_a_plan_is_filled_again_with_more_and_fewer() -> None:
    """Captured with one adapter, run with none, many, other kinds; over workspaces of NaN."""
    own = rig()
    segments = Segments(STEPS["one"], 12)
    plan = own.deltas.plan(segments, own.base, limits=LIMITS)
    before = addresses(plan)
    for name in ("one", "all kinds", "nothing", "every token its own", "all one", "one"):
        segments = Segments(STEPS[name], 12)
        own.deltas.replan(plan, segments)
        own.deltas.workspace.poison()
        x = own.x(12)
        y: Tensor = own.deltas.run(x, own.base, plan)
        assert relative_error(y.cpu(), torch.cat(own.parts(x, segments), 1)) < 2e-6, name
    assert addresses(plan) == before


@pytest.mark.parametrize("field", ("width", "planes", "items", "pages", "vectors", "entries"))
def test_a_step_that_does_not_fit_is_refused_by_name(field: str) -> None:
    own = rig()
    fields = {name: getattr(LIMITS, name) for name in Limits.__slots__}
    fields[field] = 0 if field == "planes" else 1
    plan = own.deltas.plan(Segments([], 12), own.base, limits=Limits(**fields))
    with pytest.raises(StepTooLarge, match="room for"):
        own.deltas.replan(plan, Segments(STEPS["all kinds"], 12))


def test_inputs_that_the_plan_was_made_without() -> None:
    own = rig()
    fields = {name: getattr(LIMITS, name) for name in Limits.__slots__}
    steps = {"scaled": 6, "turned": 3, "biased": 2}
    for missing, slot in steps.items():
        step = (0, 3, ((slot, 1.0),))
        limits = Limits(
            **{**fields, "uses": replace(Uses(True, True, True, True), **{missing: False})}
        )
        plan = own.deltas.plan(Segments([], 12), own.base, limits=limits)
        with pytest.raises(StepTooLarge, match=missing):
            own.deltas.replan(plan, Segments([step], 12))
    with pytest.raises(StepTooLarge, match="13 tokens"):
        own.deltas.replan(plan, Segments([], 13))


def test_experts_with_a_router_do_not_fit() -> None:
    own = rig()
    inner, out = own.inner, own.outs[0]
    own.deltas.install(9, own.deltas.prepare({0: (random_primitive("gated", out, inner),)}))
    plan = own.deltas.plan(Segments([], 12), own.base, limits=LIMITS)
    with pytest.raises(StepTooLarge, match="gates has 8 numbers"):
        own.deltas.replan(plan, Segments([(0, 3, ((9, 1.0),))], 12))


@pytest.mark.parametrize(("arch", "like"), [(120, 89), (100, 90)])
def test_a_blackwell_is_cut_as_what_it_is_like(arch: int, like: int) -> None:
    """Of sm_120 a program has 99 KiB of shared memory, and no instruction that reads them."""
    key = GroupKey("dense", 0, 4096, 512)
    for tokens in (1, 16, 64, 256):
        assert config.rule(key, tokens, arch) == config.rule(key, tokens, like)
        own = config.aux_config(tokens, 4096, arch)
        assert own == config.aux_config(tokens, 4096, like)
        group = Group(4096, (512,), torch.bfloat16)
        made = aux.constants(group, own, 128, arch, True)
        assert made == aux.constants(group, own, 128, like, True)


def test_the_table_comes_before_the_rule(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    key = GroupKey("int4", 128, 4096, 6144)
    mine = GemmConfig(16, 32, 128, 2, "after", 2, 5)
    path = config.write_table(77, {key: {16: mine}}, {"gpu": "none"}, tmp_path)  # type: ignore
    assert path.name == "sm_77.json"
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    config.table.cache_clear()
    assert config.gemm_config(key, 13, 77) == mine
    assert config.gemm_config(key, 17, 77) == config.rule(key, 17, 77)
    assert config.gemm_config(key, 13, 78) == config.rule(key, 13, 78)
    config.table.cache_clear()


def test_buckets() -> None:
    assert [config.bucket(t) for t in (1, 3, 16, 17, 65, 257, 1000)] == [
        1, 4, 16, 32, 96, 512, 1024,
    ]  # fmt: skip
