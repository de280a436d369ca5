"""One pool of OpenMP threads, the engine's.

A thread that enters a parallel region keeps a pool of workers ever after. As soon as a process has
more of them than processors, GNU's runtime lets all of them sleep between regions instead of
waiting awake, and each region then costs a wake-up: on two cores a decode step of fifty regions
took 10 ms instead of 6 because the thread that had loaded the model still had its pool.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

PAUSE_SOFT = 1  # omp_pause_soft
TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
"""Where MKL is, in builds that have it."""


@cache
def runtime_path() -> str | None:
    """The OpenMP runtime that torch has loaded, or would load; None if there is none."""
    torch.get_num_threads()
    found = _loaded() or sorted(_bundled())
    return found[0] if found else None


def compute_alone() -> None:
    """Let the calling thread compute without workers, and so without a pool."""
    path = runtime_path()
    if path is not None:
        torch.get_num_threads()  # torch sets the number once per thread, before us
        ctypes.CDLL(path).omp_set_num_threads(1)
    # torch.set_num_threads tells MKL a number of its own, which is every thread's.
    mkl = getattr(_torch(), "MKL_Set_Num_Threads_Local", None)
    if mkl is not None:
        mkl(1)


def release_workers() -> None:
    """End the workers of the calling thread's pool; a later parallel region makes new ones."""
    path = runtime_path()
    pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None) if path else None
    if pause is None or pause(PAUSE_SOFT) != 0:
        logger.info("the OpenMP runtime %s cannot release idle threads", path)


@cache
def _torch() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(TORCH))
    except OSError:  # another system's name
        return None


def _loaded() -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps if line.count("/")}
    names = ("libgomp", "libiomp5", "libomp")
    return sorted(p for p in paths if Path(p).name.startswith(names))


def _bundled() -> list[str]:
    root = Path(torch.__file__).parent
    return [
        str(p)
        for folder in (root / "lib", root.parent / "torch.libs")
        for pattern in ("libgomp*", "libiomp5*", "libomp*")
        for p in folder.glob(pattern)
    ]
