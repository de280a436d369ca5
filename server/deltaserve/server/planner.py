"""`deltaserve plan`: what fits into the memory beside a base, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import psutil
import torch
from rich.console import Console
from rich.table import Table

from deltaserve.kernels.backend import Layout
from deltaserve.kernels.cpu_backend import CpuBackend
from deltaserve.server.config import AdapterConfig, ConfigError, EngineConfig, ModelConfig
from deltaserve.server.engine.plan import Base, MemoryPlan, plan_memory
from deltaserve.server.model.loader import Quantize
from deltaserve.server.model.outline import outline


def plan(
    model: ModelConfig, engine: EngineConfig, adapters: AdapterConfig, memory: int | None
) -> MemoryPlan:
    """memory: bytes that are free before the base is loaded; None for what this machine, or its
    GPU, has. A GPU that is planned for need not be here.
    Raises ModelError for the base, ConfigError for a budget in which nothing can be served."""
    found = outline(
        model.base,
        dtype=getattr(torch, model.dtype),
        quantize=cast(Quantize, model.quantize),
        group_size=model.group_size,
        max_length=engine.max_length,
        allow_untested=model.allow_untested,
    )
    skeleton = found.skeleton
    base = Base(
        weights=found.weights,
        attention=skeleton.report.attention,
        groups=found.groups,
        norms=len(skeleton.report.norms),
        hidden=int(skeleton.config.get_text_config().hidden_size),
        vocabulary=skeleton.modules[skeleton.report.head].out_features,
        dtype=getattr(torch, model.dtype),
        max_length=skeleton.max_length,
    )
    free = _free(model.device) if memory is None else memory
    layout = _layout(model.device)
    return plan_memory(base, engine, adapters, free - found.weights, backend=layout)


def _layout(device: str) -> Layout:
    if device == "cpu":
        return CpuBackend()
    try:
        from deltaserve.kernels.gpu.layout import GpuLayout
    except ImportError as error:
        raise ConfigError(f"--device {device}: {error}; install triton") from error
    if not torch.cuda.is_available():
        return GpuLayout()
    major, minor = torch.cuda.get_device_capability()
    return GpuLayout(10 * major + minor)


def _free(device: str) -> int:
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--free auto: this machine has no GPU for --device {device}; give the bytes that are "
            "free on one, such as --free 80GiB"
        )
    return int(torch.cuda.mem_get_info()[0])


def report(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "weights_bytes": plan.weights,
        "free_bytes": plan.free,
        "step_bytes": plan.step,
        "budget_bytes": plan.budget,
        "kv_token_bytes": plan.shape.token,
        "kv_tokens": plan.kv_tokens,
        "kv_cache_bytes": plan.kv_most,
        "kv_floor_bytes": plan.kv_floor,
        "adapter_budget_bytes": plan.adapter_most,
        "max_length": plan.max_length,
        "adapters": [asdict(fit) for fit in plan.fits],
    }


def show(plan: MemoryPlan, console: Console) -> None:
    """The plan for people."""
    uses = Table(show_header=False, box=None)
    for what, value in (
        ("base", size(plan.weights)),
        ("free beside it", size(plan.free)),
        ("a step computes with", f"up to {size(plan.step)}"),
        ("cache and adapters", size(plan.budget)),
        ("cache without adapters", f"{plan.kv_tokens:,} tokens of {size(plan.shape.token)}"),
        (f"a request of {plan.max_length:,} tokens", f"{size(plan.kv_floor)}, never adapters'"),
    ):
        uses.add_row(what, value)
    console.print(uses)
    fits = Table(box=None)
    for column in ("adapters on all linears", "each", "fit", "cache tokens beside half of them"):
        fits.add_column(column, justify="left" if not fits.columns else "right")
    for fit in plan.fits:
        fits.add_row(fit.kind, size(fit.nbytes), f"{fit.count:,}", f"{fit.kv_tokens:,}")
    console.print(fits)


def size(nbytes: int) -> str:
    """With a unit, four digits at most."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
