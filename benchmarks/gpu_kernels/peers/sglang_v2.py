"""SGLang's "triton_v2" backend: kernels and overlap chosen by its table for the architecture.

Its work runs beside the base product on a second stream where the table says so, so it is timed
with a base: 16-bit weights and cuBLAS, in the same call. Routing is done once per step and is not
in the figure.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpu_kernels.data import DEVICE, DTYPE, ON_GPU, Problem
from gpu_kernels.peers import sglang
from gpu_kernels.peers.work import Work, load, stand_in

NAME = "SGLang 0.5.23 triton_v2"
DENSE = "sglang.srt.lora.dense"


def lora(folder: Path, problem: Problem, weight: Tensor, copies: int, added: bool) -> Work:
    """weight: [out, in] of the base. added: with the adapters, or the base product alone."""
    runner_module, plan_module, workspace = _modules(folder)
    a, b = sglang.stacks(problem)
    held = [(weight.clone(), a.clone(), b.clone()) for _ in range(copies)]
    tokens, slots = len(problem.batch), len(problem.adapters) + 1
    runner = runner_module.DenseLoraRunner(
        workspace.LoraWorkspace(), max_loras=slots, device=DEVICE, architecture=_architecture()
    )
    runner.begin_batch(
        token_slots=torch.tensor(problem.batch, dtype=torch.int32, device=DEVICE),
        lora_ranks=torch.tensor(sglang.ranks(problem), dtype=torch.int32, device=DEVICE),
        scalings=torch.tensor(sglang.scales(problem), device=DEVICE),
        num_tokens=tokens,
        phase=runner_module.Phase.DECODE if tokens <= 256 else runner_module.Phase.PREFILL,
        graph_mode=True,
    )
    kind, parts = plan_module.DenseLoraKind.LINEAR, problem.group.parts
    offsets = tuple(sum(parts[:i]) for i in range(len(parts) + 1))
    plan = runner.plan_for(kind, b.shape[-1], a.shape[-1], offsets[-1], num_tokens=tokens)
    y = torch.empty(tokens, offsets[-1], dtype=DTYPE, device=DEVICE)

    def call(i: int) -> Tensor:
        weight, a, b = held[i]

        def base() -> Tensor:
            return torch.mm(problem.x, weight.T, out=y)

        if not added:
            return base()
        whole: Tensor = runner.apply(problem.x, base, plan, a=a, b=b, offsets=offsets)
        return whole

    nbytes = 2 * (weight.numel() + (a.numel() + b.numel() if added else 0))
    return Work([functools.partial(call, i) for i in range(copies)], lambda: None, nbytes)


def _architecture() -> str:
    if not ON_GPU:
        return "sm90"
    major, _ = torch.cuda.get_device_capability()
    return {9: "sm90"}.get(major, "default")


@functools.lru_cache
def _modules(folder: Path) -> tuple[Any, Any, Any]:
    sglang.stand_ins(folder)
    root = folder / "sglang"
    for name in ("kernels.ops.lora.common", "srt.lora", "srt.lora.dense"):
        stand_in(f"sglang.{name}", {}, root.joinpath(*name.split(".")))
    stand_in("sglang.kernels.jit", {}, root / "kernels" / "jit")
    stand_in("sglang.kernels.jit.utils", {"is_arch_support_pdl": _has_pdl})
    stand_in("sglang.kernels.ops.lora.moe", {}, root / "kernels" / "ops" / "lora" / "moe")
    stand_in("sglang.kernels.ops.lora.moe.virtual_experts", {"_align_block_size_jit": _not_here})
    stand_in(
        "sglang.srt.lora.utils",
        {"LoRABatchInfo": Any, "Phase": Phase, "architecture_for_capability": None},
    )
    if importlib.util.find_spec("msgspec") is None:
        stand_in("msgspec", {"Struct": _Struct})
    if importlib.util.find_spec("pydantic") is None:
        stand_in(
            "pydantic",
            {
                "BaseModel": object,
                "ConfigDict": dict,
                "Field": lambda default_factory: None,
                "model_validator": lambda mode: lambda method: method,
            },
        )
    plan: Any = load(folder, DENSE, "plan")
    plan.load_plans = functools.partial(_plans, plan, root / "srt" / "lora" / "dense" / "configs")
    runner = load(folder, DENSE, "runner")
    return runner, plan, load(folder, "sglang.srt.lora", "workspace")


class Phase(StrEnum):
    DECODE = "decode"
    PREFILL = "prefill"


class _Struct:
    """As much of msgspec.Struct as a route needs."""

    def __init_subclass__(cls, **options: bool) -> None:
        dataclasses.dataclass(**options)(cls)


def _plans(plan: Any, folder: Path, architecture: str) -> SimpleNamespace:
    """Its table of an architecture, read without its validation."""
    rows = json.loads((folder / f"{architecture}.plans.json").read_text())["rows"]
    return SimpleNamespace(rows=[_row(plan, row) for row in rows])


def _row(plan: Any, row: dict[str, Any]) -> SimpleNamespace:
    spec = dict(row.get("spec", {}))
    for name, family in (("a_family", "AFamily"), ("b_family", "BFamily"), ("overlap", "Overlap")):
        if name in spec:
            spec[name] = getattr(plan, family)(spec[name])
    limits = ("tokens", "rank", "in_features", "out_features")
    bounds = {
        f"{end}_{name}": row.get(f"{end}_{name}") for end in ("min", "max") for name in limits
    }
    kinds, phase = row.get("kinds"), row.get("phase")
    return SimpleNamespace(
        **bounds,
        phase=Phase(phase) if phase else None,
        kinds=[plan.DenseLoraKind(kind) for kind in kinds] if kinds else None,
        spec=SimpleNamespace(model_dump=lambda: spec, a_family=spec.get("a_family")),
    )


def _has_pdl() -> bool:
    return ON_GPU and torch.cuda.get_device_capability() >= (9, 0)


def _not_here(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("its router for more than 512 tokens is a CUDA extension")
