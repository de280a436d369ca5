"""Lets the tests here import their neighbours, which pytest's importlib mode does not."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deltaserve.kernels.native.library import library

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.complete()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=("native", "torch"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test with the native kernels, then with torch operations alone."""
    monkeypatch.setenv("DELTASERVE_NATIVE", "1" if request.param == "native" else "0")
    library.cache_clear()
    if request.param == "native" and library() is None:
        pytest.skip("no C compiler here")
    yield request.param
    monkeypatch.undo()
    library.cache_clear()
