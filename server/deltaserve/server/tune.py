"""`deltaserve tune`: measures configurations of the base GEMM for a model's linears."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from deltaserve.kernels.gpu import config
from deltaserve.kernels.gpu.base import IN_8_BITS
from deltaserve.kernels.gpu.config import GemmConfig, GroupKey
from deltaserve.kernels.gpu.device import arch
from deltaserve.kernels.gpu.tune import Found, tune
from deltaserve.kernels.gpu.variants import GroupSpec
from deltaserve.server.model.loader import LinearShape, linear_shapes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {None: "dense", 8: "int8", 4: "int4"}
ACTIVATIONS = ("float", "int8")


class TuneError(Exception):
    """What is wrong with the arguments or the machine."""


def run(
    base: Path,
    dtype: str,
    quantize: str,
    group_size: int,
    activations: str,
    tokens: str,
    out: Path | None,
    allow_untested: bool,
) -> None:
    """Measures, says what it finds on stderr, and writes the table."""
    if dtype not in DTYPES:
        raise TuneError(f'--dtype is "{dtype}"; it must be one of {", ".join(DTYPES)}')
    if activations not in ACTIVATIONS:
        raise TuneError(f'--activations is "{activations}"; it must be float or int8')
    if activations == "int8" and quantize == "none":
        raise TuneError("--activations int8: needs integer weights; add --quantize int8 or int4")
    buckets = numbers(tokens)
    try:
        # The dtype of the skeleton does not matter: its weights are never made.
        shapes = linear_shapes(
            base,
            dtype=torch.bfloat16,
            quantize=quantize,  # type: ignore[arg-type]
            group_size=group_size,
            allow_untested=allow_untested,
        )
    except ValueError as error:
        raise TuneError(str(error)) from error
    if not torch.cuda.is_available():
        raise TuneError("no CUDA device; tuning measures on the GPU that will serve")
    device = torch.device("cuda", torch.cuda.current_device())
    specs = [
        spec for shape in shapes for spec in groups(shape, group_size, DTYPES[dtype], activations)
    ]
    found = tune(specs, buckets, device, progress=_say)
    path = write(found, arch(device), out or config.user_folder(), _about(device))
    _say(f"wrote {path}")


def numbers(tokens: str) -> list[int]:
    """Numbers between commas, rounded up to what tables know. Raises TuneError."""
    if tokens == "all":
        return list(config.BUCKETS)
    words = [word.strip() for word in tokens.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 4096 for word in words):
        raise TuneError(f'--tokens is "{tokens}"; it must be numbers from 1 to 4096, or all')
    return sorted({config.bucket(int(word)) for word in words})


def groups(
    shape: LinearShape, group_size: int, dtype: torch.dtype, activations: str = "float"
) -> list[GroupSpec]:
    """The group as it is served, and where it may be gate and up, with the activation in the
    epilogue. group_size: of int4; bytes have a scale per row."""
    format = FORMATS[shape.bits]
    if activations == "int8":
        format = IN_8_BITS[format]
    size = group_size if shape.bits == 4 else 0
    plain = GroupSpec("tune", format, shape.in_features, shape.parts, size, dtype)
    if len(shape.parts) != 2 or shape.parts[0] != shape.parts[1]:
        return [plain]
    return [plain, replace(plain, activation="silu")]


def write(found: Iterable[Found], arch: int, folder: Path, about: dict[str, str]) -> Path:
    """Each measurement is written as soon as it is known: an interrupted run loses none."""
    path = folder / f"sm_{arch}.json"
    for one in found:
        best: dict[GroupKey, dict[int, GemmConfig]] = {one.spec.key: {one.tokens: one.config}}
        path = config.write_table(arch, best, about, folder)
        faster = f"{one.rule_us / one.us:.2f}x of {one.rule_us:.1f}"
        _say(f"{one.spec.key}: {one.tokens} tokens: {one.us:.1f} us, {faster}: {one.config}")
    return path


def _about(device: torch.device) -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": version("torch"),
        "triton": version("triton"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
