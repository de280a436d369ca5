"""The backends by the names of their devices."""

from __future__ import annotations

import torch

from deltaserve.kernels.backend import Backend, DeviceUnavailable
from deltaserve.kernels.cpu_backend import CpuBackend


def open_backend(device: str) -> Backend:
    """The backend of `--device`, "cpu" or "cuda". Raises DeviceUnavailable."""
    if device == "cpu":
        return CpuBackend()
    if torch.version.cuda is None:
        raise DeviceUnavailable(
            f"cuda: torch {torch.__version__} was built without CUDA; install a build with it, or "
            "use cpu"
        )
    if not torch.cuda.is_available():
        raise DeviceUnavailable(
            f"cuda: torch {torch.__version__} finds no CUDA device; is the driver installed, and "
            "does CUDA_VISIBLE_DEVICES leave one?"
        )
    try:
        from deltaserve.kernels.gpu.backend import TritonBackend
        from deltaserve.kernels.gpu.device import interpreted
    except ImportError as error:
        raise DeviceUnavailable(f"cuda: {error}; install triton") from error
    if interpreted():
        raise DeviceUnavailable("cuda: with TRITON_INTERPRET set nothing runs on a GPU; unset it")
    return TritonBackend()
