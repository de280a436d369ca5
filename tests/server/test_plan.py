"""What the planner says is what is then measured, and what cannot be is refused with numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from rig import load_base, request, running
from serving import until
from typer.testing import CliRunner
from variants import make_base, peft_variant

from deltaserve.adapters.delta_file import write_delta
from deltaserve.kernels.backend import Backend
from deltaserve.kernels.cpu_backend import CpuBackend
from deltaserve.kernels.primitives import Bit
from deltaserve.server import planner, run
from deltaserve.server.cli import app
from deltaserve.server.config import AdapterConfig, ConfigError, EngineConfig, ModelConfig
from deltaserve.server.engine.build import base_of
from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.plan import Base, MemoryPlan, plan_memory
from deltaserve.server.model.probe import LayerAttention

MEMORY = 400 << 10
LENGTH = 128
KINDS = {
    "LoRA r16": peft_variant(
        "", lambda c: LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    ),
    "DoRA r16": peft_variant(
        "",
        lambda c: LoraConfig(
            task_type="CAUSAL_LM", r=16, target_modules="all-linear", use_dora=True
        ),
    ),
    "IA3": peft_variant(
        "",
        lambda c: IA3Config(
            task_type="CAUSAL_LM", target_modules="all-linear", feedforward_modules=[]
        ),
    ),
}


@pytest.fixture(scope="module", params=["llama", "llama-tied-biased"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    make_base(root / "base", request.param)
    for kind, variant in KINDS.items():
        variant.make(root / "base", root / kind, torch.Generator().manual_seed(0))
    return root


def bitdelta(base: Path, folder: Path) -> None:
    model = load_base(base)
    names = [n for g in model.modules.groups.values() if not g.logits for n in g.names]
    modules = {}
    for name in names:
        out, width = model.spec.weight(name).shape
        signs = torch.randint(0, 256, (1, out, width // 8), dtype=torch.uint8)
        modules[name] = (Bit(signs, torch.rand(1, out)),)
    write_delta(folder, modules, kind="test")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_takes_the_bytes_that_were_planned(folder: Path, dtype: str) -> None:
    if not (folder / "BitDelta").exists():
        bitdelta(folder / "base", folder / "BitDelta")
    with running(load_base(folder / "base", dtype=dtype), [folder]) as engine:
        plan = engine.info().memory
        assert {fit.kind for fit in plan.fits} == {*KINDS, "BitDelta", "LoRA r64"}
        for fit in plan.fits:
            if fit.kind != "LoRA r64":
                info = engine.adapters.load(fit.kind, str(folder / fit.kind)).result(60)
                assert info.resident_bytes == fit.nbytes, fit.kind


def test_as_many_fit_as_were_planned_and_one_more_evicts(folder: Path) -> None:
    make = KINDS["LoRA r16"].make
    with running(
        load_base(folder / "base"), [folder], memory=MEMORY, kv_cache_bytes=None, max_length=LENGTH
    ) as engine:
        plan = engine.info().memory
        fit = plan.fits[0]
        assert fit.count >= 2 and plan.budget == MEMORY
        for i in range(fit.count + 1):
            make(folder / "base", folder / f"many{i}", torch.Generator().manual_seed(i))
            engine.adapters.load(f"many{i}", str(folder / f"many{i}")).result(60)
            assert engine.adapters.evictions == max(0, i + 1 - fit.count)
        longest = [request([7] * (LENGTH - 12), name) for name in ("", f"many{fit.count}")]
        for answer in generate(engine, longest, 60):
            assert len(answer.token_ids) == 12
        assert engine.stats().kv_blocks_total * 8 == plan.kv_tokens


def test_as_many_tokens_fit_as_were_planned(folder: Path) -> None:
    with running(
        load_base(folder / "base"), [folder], memory=MEMORY, kv_cache_bytes=None, max_length=LENGTH
    ) as engine:
        plan = engine.info().memory
        blocks = engine._scheduler.blocks
        assert blocks.available * 8 == plan.kv_tokens
        nbytes = engine.adapters.load("a", str(folder / "LoRA r16")).result(60).resident_bytes
        engine.adapters.pin("a", True)  # which the engine's thread sees in its next step
        left = plan.kv_tokens_beside(nbytes)
        assert left < plan.kv_tokens
        until(lambda: blocks.available * 8 == left, f"{left} tokens fit")


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_the_command_plans_what_the_server_does(folder: Path, quantize: str) -> None:
    model = load_base(folder / "base", quantize=quantize)
    engine = EngineConfig(memory=MEMORY, max_length=LENGTH, block_size=8)
    model.max_length = LENGTH
    ours = plan_memory(base_of(model), engine, AdapterConfig(), 1 << 33)
    config = ModelConfig(folder / "base", quantize=quantize, group_size=32)
    theirs = planner.plan(config, engine, AdapterConfig(), 1 << 33)
    assert theirs.weights == pytest.approx(ours.weights, rel=0.05)
    assert replace(theirs, weights=0, free=0) == replace(ours, weights=0, free=0)


def test_the_command_prints_a_table_and_json(folder: Path) -> None:
    arguments = ["plan", "--base", str(folder / "base"), "--memory", "1MiB", "--max-length", "64"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "LoRA r16" in shown.stdout and "1.0 MiB" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["budget_bytes"] == 1 << 20 and found["adapters"][0]["count"] > 0


def test_the_command_plans_for_a_gpu_that_is_not_there(folder: Path) -> None:
    arguments = ["plan", "--base", str(folder / "base"), "--device", "cuda", "--memory", "4MiB"]
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 2 and "such as --free 80GiB" in result.stderr
    arguments += ["--max-length", "64", "--free", "80GiB", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    given = json.loads(CliRunner().invoke(app, [*arguments, "--dtype", "float32"]).stdout)
    assert given["kv_token_bytes"] == 2 * found["kv_token_bytes"]
    assert given["kv_cache_bytes"] + given["adapter_budget_bytes"] > given["budget_bytes"]
    small = ["--max-sequences", "1"]
    assert (
        json.loads(CliRunner().invoke(app, [*arguments, *small]).stdout)["step_bytes"]
        < (found["step_bytes"])
    )


class Whole(CpuBackend):
    """One allocation for cache and adapters, these up to a MiB."""

    returns_pages = False
    adapter_limit = 1 << 20


def plan(
    free: int,
    adapter_bytes: int | None = None,
    backend: Backend | None = None,
    **config: int | None,
) -> MemoryPlan:
    layer = LayerAttention(0, 4, 2, 64, 64, None, None, False, 1.0)  # a page a block and side
    base = Base(1000, (layer,), {}, 3, 64, 260, torch.float32, 512)
    return plan_memory(
        base,
        EngineConfig(max_batch_tokens=1, max_sequences=2, block_size=8, **config),  # type: ignore[arg-type]
        AdapterConfig(bytes=adapter_bytes),
        free,
        backend=backend,
    )


def test_a_budget_without_room_for_the_longest_request_is_refused() -> None:
    floor = 65 * 8192  # 512 tokens are 64 blocks, and one pads
    assert plan(1 << 30, memory=floor).kv_floor == floor
    with pytest.raises(ConfigError) as error:
        plan(1 << 30, memory=floor - 1)
    message = str(error.value)
    assert f"--memory {floor - 1}:" in message and f"takes {floor} bytes" in message
    assert "lower --max-length to 504" in message and f"--memory {floor} or more" in message
    assert plan(1 << 30, memory=floor - 1, kv_cache_bytes=floor // 2).kv_floor <= floor // 2 + 8192


def test_more_than_is_free_is_refused() -> None:
    step = plan(1 << 30).step
    with pytest.raises(ConfigError, match=rf"--memory {1 << 30}: a step .* {step} bytes"):
        plan(1 << 30, memory=1 << 30)
    plan(1 << 30, memory=(1 << 30) - step)
    with pytest.raises(ConfigError, match=r"--kv-cache-bytes .* and --adapter-bytes 99999999999"):
        plan(1 << 30, kv_cache_bytes=1 << 20, adapter_bytes=99999999999)
    with pytest.raises(ConfigError, match=r"--memory auto, which is \d+ here: one request"):
        plan(1_400_000)


def test_the_limits_stay_inside_the_budget() -> None:
    found = plan(1 << 30, memory=1 << 20, adapter_bytes=1000, kv_cache_bytes=80 * 8192)
    assert (found.blocks, found.adapter_most) == (80, 1000)
    assert plan(1 << 30, memory=1 << 20).adapter_most == (1 << 20) - 65 * 8192


def test_one_allocation_is_shared_out_as_pages_are() -> None:
    for adapter_bytes in (None, 1000, 1 << 40):
        for kv_cache_bytes in (None, 80 * 8192):
            given = {"memory": 1 << 20, "kv_cache_bytes": kv_cache_bytes}
            found = plan(1 << 30, adapter_bytes, Whole(), **given)
            assert found == plan(1 << 30, adapter_bytes, **given)
    assert plan(1 << 30, None, Whole(), memory=1 << 23).adapter_most == 1 << 20


def test_a_block_whose_layers_lie_side_by_side_is_of_whole_cache_lines() -> None:
    layer = LayerAttention(0, 4, 2, 5, 64, None, None, False, 1.0)
    base = Base(1000, (layer,), {}, 3, 64, 260, torch.float32, 512)
    config = EngineConfig(memory=1 << 20, block_size=3)
    shape = plan_memory(base, config, AdapterConfig(), 1 << 30, backend=Whole()).shape
    assert (shape.block, shape.extent) == (128 + 3 * 2 * 64 * 4, 1)


def test_preloaded_adapters_that_do_not_fit_together_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its handler would write to the stream that is captured here, long after that is closed
    monkeypatch.setattr(run.logs, "set_up", lambda level: None)
    given = [f"--adapter={n}={folder / n}" for n in ("LoRA r16", "DoRA r16")]
    result = CliRunner().invoke(
        app,
        [
            *("serve", "--base", str(folder / "base"), "--memory", "240KiB", "--port", "0"),
            *("--max-length", "64", "--max-batch-tokens", "8"),
            *[g.replace(" r16=", "=", 1) for g in given],
        ],
    )
    assert result.exit_code == 2
    assert re.search(r"take up to \d+ bytes, and there is room for \d+ beside", result.stderr)
