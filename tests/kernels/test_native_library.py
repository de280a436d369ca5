"""Building and loading the native kernels: the cache, the fallback, the one thread pool."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deltaserve.kernels.base import make_linear
from deltaserve.kernels.linear import LinearDeltas
from deltaserve.kernels.native import build as build_module
from deltaserve.kernels.native.build import BuildError, build
from deltaserve.kernels.native.library import library
from deltaserve.kernels.primitives import LowRank
from deltaserve.kernels.segments import Segments

SOURCE = """
#include <omp.h>
int ds_answer(void) { int n = 0;
#pragma omp parallel reduction(+ : n)
n += 1; return n > 0; }
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DELTASERVE_NATIVE", raising=False)
    library.cache_clear()
    yield
    monkeypatch.undo()
    library.cache_clear()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of one function and an empty cache; returns the folder of both."""
    (tmp_path / "one.c").write_text(SOURCE)
    monkeypatch.setattr(build_module, "SOURCES", tmp_path)
    monkeypatch.setenv("DELTASERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_is_compiled_once_for_each_source(small: Path) -> None:
    path = build_or_skip()
    stamp = path.stat().st_mtime_ns
    assert build() == path and path.stat().st_mtime_ns == stamp
    assert list((small / "cache").iterdir()) == [path]
    (small / "one.c").write_text(SOURCE + "/* another */")
    assert build() != path


def test_processes_that_start_together(small: Path) -> None:
    build_or_skip().unlink()
    code = f"""
from pathlib import Path
from deltaserve.kernels.native import build
build.SOURCES = Path({str(small)!r})
print(build.build())
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=200)[0].strip() for process in started}
    assert paths == {str(p) for p in (small / "cache").iterdir()} and len(paths) == 1


def test_a_source_that_does_not_compile(small: Path) -> None:
    build_or_skip()
    (small / "one.c").write_text("this is not C")
    with pytest.raises(BuildError, match="failed"):
        build()


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> str:
        raise BuildError("no C compiler (cc, gcc or clang) is on the path")

    monkeypatch.setattr(build_module, "_compiler", missing)
    with caplog.at_level(logging.WARNING):
        assert library() is None and library() is None
    assert [r.message for r in caplog.records if "no C compiler" in r.message] == [
        caplog.records[0].message
    ]
    assert serves()


def test_a_cache_that_cannot_be_written(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "file").write_text("")
    monkeypatch.setenv("DELTASERVE_CACHE", str(small / "file"))
    assert library() is None and serves()


def test_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTASERVE_NATIVE", "0")
    assert library() is None and serves()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_there_is_one_openmp_runtime() -> None:
    if library() is None:
        pytest.skip("no C compiler here")
    assert serves()
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line}
    assert len(found) == 1


def test_more_threads_than_one_give_the_same() -> None:
    if library() is None:
        pytest.skip("no C compiler here")
    weight = torch.randn(700, 600)
    linears = [make_linear(weight, None, dtype=torch.float32, quantize=q) for q in ("int8", "int4")]
    x = torch.randn(7, 600)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [linear(x) for linear in linears]
        torch.set_num_threads(3)
        three = [linear(x) for linear in linears]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def build_or_skip() -> Path:
    try:
        return build()
    except BuildError as error:
        pytest.skip(str(error))


def serves() -> bool:
    """Whether a base linear with an adapter on it gives the right answer."""
    weight, p = torch.randn(9, 33), LowRank(torch.randn(2, 33), torch.randn(9, 2), 0.5)
    deltas = LinearDeltas(33, (9,), torch.float32)
    deltas.install(1, deltas.prepare({0: (p,)}))
    x = torch.randn(2, 33)
    base = make_linear(weight, None, dtype=torch.float32, quantize="int8")
    y = deltas.forward(x, base, Segments([(0, 1, ((1, 1.0),))], 2))
    expected = x @ base.weight().T
    expected[0] += p.b @ (p.a @ x[0]) * p.scale
    return torch.allclose(y, expected, atol=1e-4)
