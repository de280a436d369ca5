"""Measuring configurations of the base GEMM on the GPU that will serve."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.base import FOUR_BITS, WITH_ZEROS
from deltaserve.kernels.gpu.config import BITS, WHOLE, GemmConfig, GroupKey, depth, gemm_config
from deltaserve.kernels.gpu.gemm import Output, run_gemm
from deltaserve.kernels.gpu.inputs import Inputs, run_inputs, wanted
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.precompile import precompile
from deltaserve.kernels.gpu.variant import Variant
from deltaserve.kernels.gpu.variants import (
    GroupSpec,
    gemm_variant,
    inputs_variant,
    quantize_variant,
)
from deltaserve.kernels.gpu.weights import Weights
from deltaserve.kernels.gpu.workspace import Workspace

L2_BYTES = 256 << 20
"""Copies of the weights are taken in turn until they are more than this: no cache holds them."""

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a program may have."""

WRONG = 0.02
"""A configuration whose output differs by more from the rule's, in root mean square, is out."""

Timer: TypeAlias = Callable[[Callable[[int], object], int], float]
"""(launch of the i-th copy, number of copies) -> microseconds of one launch."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best configuration of a group for a number of tokens, and the rule's for comparison,
    in microseconds."""

    spec: GroupSpec
    tokens: int
    config: GemmConfig
    us: float
    rule_us: float


def candidates(key: GroupKey, tokens: int, arch: int) -> Iterator[GemmConfig]:
    """Configurations worth a measurement, the table's or rule's own first."""
    first = gemm_config(key, tokens, arch)
    yield first
    tiles = [t for t in (8, 16, 32, 64, 128) if t >= min(tokens, 64)][:2]
    deep = depth(key)
    for bm in tiles:
        for bn in (32, 64, 128):
            for bk in sorted({deep, min(deep, 64)}):
                for split in (1, 2, 4) if bm <= 32 and not key.gated else (1,):
                    for stages in (3, 5, 8) if bm <= 32 else (3, 4):
                        for how in _ways(key, bm):
                            config = GemmConfig(bm, bn, bk, split, how, _warps(bm, bn), stages)
                            if config != first and _fits(key, config, arch):
                                yield config


def tune(
    specs: Sequence[GroupSpec],
    buckets: Sequence[int],
    device: torch.device,
    *,
    timer: Timer | None = None,
    compile: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Found]:
    """Measures every candidate for every group and number of tokens, one after the other.

    Raises RuntimeError without a CUDA device, unless a timer is given.
    """
    if timer is None:
        if device.type != "cuda":
            raise RuntimeError("tuning measures: it needs a CUDA device")
        timer = graph_us
    arch = gpu.arch(device)
    for spec in specs:
        copies = _copies(spec, device)
        for tokens in buckets:
            configs = list(candidates(spec.key, tokens, arch))
            progress(f"{spec.key}: {tokens} tokens, {len(configs)} configurations")
            if compile:
                precompile([v for c in configs for v in _variants(spec, c)], arch)
            yield _best(spec, tokens, configs, copies, timer)


def _best(
    spec: GroupSpec,
    tokens: int,
    configs: Sequence[GemmConfig],
    copies: Sequence[Weights],
    timer: Timer,
) -> Found:
    device = copies[0].device
    space = Workspace(device)
    x = torch.randn(tokens, spec.in_features, device=device).to(spec.dtype)
    times: list[tuple[float, GemmConfig]] = []
    expected: Tensor | None = None
    for config in configs:
        want = wanted(tokens, copies[0], None, config, len(spec.parts))
        inputs = run_inputs(x, want, None, None, space)

        def launch(i: int, config: GemmConfig = config, inputs: Inputs = inputs) -> Tensor:
            nothing, output = space.take("nothing", 1), Output(spec.activation)
            return run_gemm(
                inputs, nothing, nothing, copies[i], spec.parts, None, config, None, space, output
            )

        try:
            y = launch(0).float()
        except OutOfResources:  # how much shared memory one takes, only the compiler knows
            continue
        expected = y if expected is None else expected
        if float((y - expected).norm()) <= WRONG * float(expected.norm()):
            times.append((timer(launch, len(copies)), config))
    us, best = min(times, key=lambda pair: pair[0])
    return Found(spec, tokens, best, us, times[0][0])


def graph_us(launch: Callable[[int], object], copies: int) -> float:
    """Median microseconds of a launch, from replays of a graph of one launch per copy."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        launch(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            launch(i)
    times = []
    for _ in range(12):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * float(start.elapsed_time(end)) / copies)
    return statistics.median(times[2:])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _ways(key: GroupKey, bm: int) -> tuple[str, ...]:
    if key.format != "int4":
        return ("sums",)
    return ("sums", "after") if bm <= 32 else ("after",)


def _warps(bm: int, bn: int) -> int:
    return 2 if bn == 32 else 8 if bm * bn >= 8192 else 4


def _fits(key: GroupKey, config: GemmConfig, arch: int) -> bool:
    if key.gated and config.bn < 64:
        return False
    of_x = 8 if key.format in WHOLE else 16
    stage = config.bk * (config.bm * of_x + config.bn * BITS[key.format]) // 8
    return stage * config.num_stages <= SHARED_BYTES.get(arch, 99 << 10)


def _variants(spec: GroupSpec, config: GemmConfig) -> Iterator[Variant]:
    tokens = max(config.bm, 16)
    yield gemm_variant(spec, config, tokens, 0)
    step = config.summed(spec.format, spec.key.group_size)
    if spec.whole:
        yield quantize_variant(spec, tokens, step)
        step = 0
    if step or spec.ordered:
        yield inputs_variant(spec, tokens, step, Uses())


def _copies(spec: GroupSpec, device: torch.device) -> list[Weights]:
    """Weights of random bits; a scale keeps the outputs near one."""
    out, inner = sum(spec.parts), spec.in_features
    made: list[Weights] = []
    size = 0
    while size <= L2_BYTES or len(made) < 2:
        made.append(_random(spec, out, inner, device))
        size += made[-1].weight.numel() * made[-1].weight.element_size()
        if device.type != "cuda":
            break
    return made


def _random(spec: GroupSpec, out: int, inner: int, device: torch.device) -> Weights:
    size = spec.key.group_size
    padded = -(-inner // 128) * 128
    rows = (padded // size if size < 128 else -(-inner // size), out) if size else (out,)
    weight, order = torch.zeros(16, device=device), None
    scale = zero = weight
    if spec.format == "dense":
        weight = (torch.randn(out, inner, device=device) / inner**0.5).to(spec.dtype)
    else:
        span = 32 if spec.format in FOUR_BITS else 16
        words = torch.randint(-(2**31), 2**31 - 1, (padded // span, out, 4), device=device)
        weight = words.int() & (0x3F3F3F3F if spec.format == "fp8" else -1)  # fp8: no NaN
        if spec.format == "w8a8":
            weight = weight.view(torch.int8)
        near = 70 if span == 16 else 5
        scale = torch.full(rows, 1 / (near * inner**0.5), device=device)
    if spec.format in WITH_ZEROS:
        middle = 0 if spec.format == "uint8" else 8
        zero = torch.randint(middle - 2, middle + 2, rows, device=device).float()
        if not spec.wide_scales:
            scale = torch.stack((scale, zero), -1).to(spec.dtype).view(torch.int32).squeeze(-1)
    elif spec.format == "code4":
        zero = torch.linspace(-8, 7, 16, device=device)
    if spec.ordered:
        order = torch.randperm(inner, device=device, dtype=torch.int32)
    return Weights(
        spec.format, inner, out, size, spec.dtype, weight, scale, zero, None, order=order
    )
