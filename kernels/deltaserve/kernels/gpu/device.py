"""What a device can do, and Triton's names for torch's types."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in host memory."""
    return bool(triton.knobs.runtime.interpret)


def packs() -> bool:
    """Whether pairs are unpacked by PTX instructions, which the interpreter has not got."""
    return not interpreted()


def unpacked_type(dtype: torch.dtype) -> tl.dtype:
    """The type that weights of a few bits are unpacked to, for inputs of `dtype`."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def default_device() -> torch.device:
    """The GPU, or the interpreter's host memory."""
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly")
    return torch.device("cuda", torch.cuda.current_device())


@cache
def arch(device: torch.device) -> int:
    """Compute capability as one number: 80, 89, 90, 100. The interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; 2 in the interpreter, whose programs run one after the other."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may start before the one it depends on ends (programmatic dependent
    launch: sm_90 and later)."""
    return device.type == "cuda" and arch(device) >= 90
