"""One way to launch a kernel: on the GPU, or in the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltaserve.kernels.gpu.device import interpreted


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    pdl: bool = False,
) -> None:
    """pdl: the launch may start before the one before it ends; the kernel's constant PDL says the
    same, and waits."""
    if interpreted():
        kernel[grid](*arguments, **constants)
        return
    kernel[grid](*arguments, **constants, **launch_options(num_warps, num_stages, pdl))


def launch_options(num_warps: int, num_stages: int, pdl: bool) -> dict[str, Any]:
    """What Triton compiles a launch with."""
    options: dict[str, Any] = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,  # said, because Triton's default is about to change
    }
    if pdl:
        options["launch_pdl"] = True
    return options
