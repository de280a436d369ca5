"""Compiling before serving: every variant into Triton's cache, so that no request waits for a
compiler. It needs no GPU; a server does it before it reports ready, on all processors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from deltaserve.kernels.gpu.launch import launch_options
from deltaserve.kernels.gpu.variant import Variant

TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}


MOST = 32
"""Processes at once: each has a quarter of a gigabyte of its own before it compiles anything."""


class _Driver:
    """A GPU of an architecture that kernels are compiled for and never run on."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Pointer(MockTensor):  # type: ignore[misc]
    """A tensor's type and alignment."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        super().__init__(dtype)
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def compile_variant(variant: Variant, arch: int) -> Any:
    """Triton's compiled kernel for sm_`arch`, out of its cache if it is there: by the way of a
    launch, so that a launch finds it. For a process that has no GPU of its own: it is left with
    one that runs nothing."""
    kernel = variant.kernel
    constants = dict(variant.constants)
    if arch < 90 and "PDL" in constants:
        constants["PDL"] = False  # programmatic dependent launch came with sm_90
    given = {*constants, *variant.signature}
    if given != set(kernel.arg_names) or not variant.aligned <= set(variant.signature):
        odd = sorted(given ^ set(kernel.arg_names) | variant.aligned - set(variant.signature))
        raise ValueError(f"the variant and {kernel.__name__} differ in {', '.join(odd)}")
    driver.set_active(_Driver(arch))
    values = {name: _value(t, name in variant.aligned) for name, t in variant.signature.items()}
    options = launch_options(variant.num_warps, variant.num_stages, variant.pdl and arch >= 90)
    return kernel.run(grid=(1,), warmup=True, **values, **constants, **options)


def _value(type: str, aligned: bool) -> Any:
    if type.startswith("*"):
        return _Pointer(TYPES[type[1:]], 0 if aligned else 4)
    return 0.5 if type == "fp32" else 2


def precompile(
    variants: Sequence[Variant],
    arch: int,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Compiles what is not in the cache yet. workers: processes; if None as many as processors that
    this one may use, up to MOST. progress: called with (done, all, name) after each. Raises the
    first compiler's error.
    """
    unique = {v.identity: v for v in variants}.values()
    workers = min(workers or min(_processors(), MOST), max(1, len(unique)))
    context = multiprocessing.get_context("spawn")  # a fork would inherit the engine's threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_compile, _sent(v), arch): v.name for v in unique}
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            if progress is not None:
                progress(done, len(waiting), waiting[future])


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compile(variant: Variant, arch: int) -> None:
    module, name = variant.kernel
    kernel = getattr(__import__(module, fromlist=[name]), name)
    compile_variant(replace(variant, kernel=kernel), arch)


def _sent(variant: Variant) -> Variant:
    """With the kernel's name instead of itself, which cannot be sent to another process."""
    kernel = variant.kernel
    return replace(variant, kernel=(kernel.fn.__module__, kernel.fn.__name__))
