"""What the device can do at best: copying, multiplying, and starting kernels in a graph."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from gpu_kernels.data import DEVICE, DTYPE, ON_GPU
from gpu_kernels.timing import measure

COPY_BYTES = 4 << 30 if ON_GPU else 1 << 20
SQUARE = 8192 if ON_GPU else 128
PROGRAMS = 132


@triton.jit
def add_one_kernel(counters, PDL: tl.constexpr):
    """One load and one store a program: what is left is the launch."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = counters + tl.program_id(0)
    tl.store(at, tl.load(at) + 1)


@functools.cache
def copy_tb_per_s() -> float:
    """Bytes read plus bytes written by a copy on the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / measure([lambda: target.copy_(source)], 5).us / 1e6


@functools.cache
def matmul_tflop_per_s() -> float:
    """16-bit operands, random numbers: zeros run faster than any data does."""
    a, b = (torch.randn(SQUARE, SQUARE, device=DEVICE).to(DTYPE) for _ in range(2))
    return 2 * SQUARE**3 / measure([lambda: torch.mm(a, b)], 5).us / 1e6


def clock_mhz() -> float:
    """Of the multiprocessors while they multiply. Raises ModuleNotFoundError without pynvml."""
    a, b = (torch.randn(SQUARE, SQUARE, device=DEVICE).to(DTYPE) for _ in range(2))
    for _ in range(100):
        torch.mm(a, b)
    found = float(torch.cuda.clock_rate())  # the products go on meanwhile
    torch.cuda.synchronize()
    return found


def launch_us(pdl: bool) -> float:
    """Of one small kernel among many in a graph, with programmatic dependent launch or without: the
    slope between two lengths, so that starting the graph drops out."""
    counters = torch.zeros(PROGRAMS, device=DEVICE)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}

    def launch() -> None:
        add_one_kernel[(PROGRAMS if ON_GPU else 2,)](counters, pdl, num_warps=4, **options)

    def chain(length: int) -> float:
        def call() -> None:
            for _ in range(length):
                launch()

        return measure([call]).us

    few, many = (8, 40) if ON_GPU else (1, 2)
    return (chain(many) - chain(few)) / (many - few)


def has_pdl() -> bool:
    return ON_GPU and torch.cuda.get_device_capability() >= (9, 0)


def rows() -> Iterator[dict[str, Any]]:
    """A row of each ceiling."""
    for what, unit, find in (
        ("device copy", "TB/s", copy_tb_per_s),
        ("16-bit matmul", "TFLOP/s", matmul_tflop_per_s),
        ("clock while multiplying", "MHz", clock_mhz),
        ("launch in a graph", "us", lambda: launch_us(False)),
        ("launch in a graph, PDL", "us", lambda: launch_us(True)),
    ):
        head = {"part": "ceilings", "what": what}
        if what.endswith("PDL") and not has_pdl():
            yield {**head, "absent": "needs compute capability 9.0"}
            continue
        if find is clock_mhz and not ON_GPU:
            yield {**head, "absent": "needs a GPU"}
            continue
        try:
            yield {**head, "value": round(find(), 4), "unit": unit}
        except (RuntimeError, ImportError) as error:
            yield {**head, "absent": str(error)[:300]}
