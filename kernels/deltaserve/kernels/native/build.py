"""Compiling the C files into a shared library, once per source, compiler and processor."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deltaserve.kernels import cache

SOURCES = Path(__file__).parent
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-Wno-psabi",
)
TIMEOUT_S = 180


class BuildError(Exception):
    """No compiler, or it failed; the message says which."""


def build() -> Path:
    """The compiled library's path, from the cache if it is there. Raises BuildError.

    The cache is ``$DELTASERVE_CACHE`` or ``~/.cache/deltaserve``; the file is put in place by one
    rename, so processes that start together do not disturb each other.
    """
    compiler = _compiler()
    flags = (*FLAGS, *_native_flags())
    target = cache.folder() / f"kernels-{_key(compiler, flags)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = _compile(compiler, flags, Path(scratch))
            made.replace(target)
    except OSError as error:
        raise BuildError(f"the cache {target.parent} cannot be written: {error}") from error
    return target


def _compile(compiler: str, flags: Sequence[str], scratch: Path) -> Path:
    objects: list[str] = []
    for source in sorted(SOURCES.glob("*.c")):
        objects.append(str(scratch / f"{source.stem}.o"))
        _run([compiler, *flags, "-c", str(source), "-o", objects[-1]])
    made = scratch / "kernels.so"
    # Linked without -fopenmp: the runtime is the one torch has loaded, so there is one thread pool.
    _run([compiler, "-shared", *objects, "-o", str(made), "-lm"])
    return made


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-400:]}")


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C compiler (cc, gcc or clang) is on the path")


def _native_flags() -> tuple[str, ...]:
    if platform.machine() in ("x86_64", "AMD64"):
        # GCC would use 256-bit vectors on some processors that do 512-bit ones as fast.
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",)


def _key(compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT_S).stdout
    digest.update(version + " ".join(flags).encode() + _processor())
    for source in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> bytes:
    """What -march=native depends on: a cache on a shared disk serves unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))
