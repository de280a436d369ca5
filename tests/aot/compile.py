"""Compiles one variant for a GPU that need not be there, and measures what came out."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import triton
from aot import ptx, sass

from deltaserve.kernels.gpu.precompile import compile_variant
from deltaserve.kernels.gpu.variant import Variant


@dataclass(frozen=True)
class Reading:
    """What one variant became on one architecture.

    local: bytes of stack and local memory per thread. shared: bytes per program. unrolled: how
    many iterations one turn of each loop does. threads: of a program. seconds: of compilation.
    """

    name: str
    arch: int
    seconds: float
    registers: int
    local: int
    shared: int
    threads: int
    weights: int
    program: sass.Program
    unrolled: tuple[int, ...]

    @property
    def instructions_per_weight(self) -> float | None:
        """Of the main loop; None where there are no weights to count by."""
        # tcgen05 loops are split over warps that run different instructions
        if not self.weights or self.arch >= 100:
            return None
        main = self.program.loops[0].instructions * self.threads
        return main / (self.weights * self.unrolled[0])


@dataclass(frozen=True)
class Refusal:
    """Why there is no reading."""

    name: str
    arch: int
    reason: str


@functools.cache
def variants(module: str, arch: int) -> tuple[Variant, ...]:
    """All variants that `module` lists for sm_`arch`. Raises ValueError if two share a name."""
    found = tuple(importlib.import_module(module).all_variants(arch))
    names = [v.name for v in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{module} lists more than one variant named {', '.join(twice)}")
    return found


def measure(module: str, index: int, arch: int) -> Reading | Refusal:
    """Compile `variants(module, arch)[index]` for sm_`arch`; a compile error is a Refusal."""
    variant = variants(module, arch)[index]
    with _captured() as output:
        try:
            return _measure(variant, arch)
        except Exception as error:  # whatever a compiler raises is for the table
            sys.stdout.flush()
            output.seek(0)
            reason = explain(f"{type(error).__name__}: {error}", output.read())
            return Refusal(variant.name, arch, reason)


def explain(error: str, output: str) -> str:
    """The lines that say what was wrong, without the PTX that Triton prints around them."""
    lines = [line.strip() for line in f"{error}\n{output}".splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ptxas") and "info" not in line.split()[:2]]
    if not said:
        named = [line for line in lines[1:] if re.search(r"\berror:|Error", line)]
        pointed = [pair[0] for pair in pairwise(lines) if pair[1] == "^"]  # at a line of source
        said = [lines[0], *pointed, *(named or error.strip().splitlines()[-1:])]
    said = [re.sub(r"^ptxas /\S+, ", "ptxas ", line) for line in said]
    return "\n".join(list(dict.fromkeys(said))[:6])


def _measure(variant: Variant, arch: int) -> Reading:
    start = time.perf_counter()
    kernel = compile_variant(variant, arch)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        program = sass.read(_tool("nvdisasm", "-c", str(cubin)))
        registers, local = usage(_tool("cuobjdump", "-res-usage", str(cubin)))
    return Reading(
        name=variant.name,
        arch=arch,
        seconds=seconds,
        registers=registers,
        local=local,
        shared=kernel.metadata.shared,
        threads=kernel.metadata.num_warps * 32,
        weights=variant.weights,
        program=program,
        unrolled=ptx.unrolled(kernel.asm["ptx"], program.loops),
    )


def usage(text: str) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of a thread, from cuobjdump's line."""
    figures = {key: int(value) for key, value in re.findall(r"\b(\w+):(\d+)", text)}
    return figures["REG"], figures["STACK"] + figures["LOCAL"]


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    result = subprocess.run([path, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr.strip()}")
    return result.stdout


@contextmanager
def _captured() -> Iterator[IO[str]]:
    """Everything this process writes meanwhile, compilers in C++ included."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield file
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
