"""What the GPU's side asks of torch, by a torch.cuda that computes nothing and writes it down: on
which stream steps are captured, and that a stream waits for what another has made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.kernels.gpu.capture import CudaCapture, NotCapturable
from deltaserve.kernels.gpu.streams import to_host

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Cuda:
    """now: the current stream. capturing: what a capture under way was asked for. checks: whether
    the host may not wait. breaks: the end of a capture raises. lost: so does all that waits."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.default = Stream()
        self.capturing: dict[str, Any] | None = None
        self.checks: object = 0
        self.breaks = self.lost = False
        for name in ("graph", "stream", "current_stream", "synchronize", "CUDAGraph"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.checks)
        patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "checks", mode))

    def synchronize(self, device: torch.device) -> None:
        assert self.checks == 0 and self.capturing is None
        if self.lost:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    class CUDAGraph:
        replays = 0

        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            self.replays += 1

    @contextmanager
    def graph(self, graph: object, pool: object = None, stream: Any = None, **asked: Any) -> Any:
        before, self.now, self.capturing = self.now, stream, {"pool": pool, **asked}
        try:
            yield
        finally:
            self.capturing = None
            if self.breaks:  # as torch, which then does not go back to the stream before
                raise RuntimeError("operation failed due to a previous error during capture")
            self.now = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_steps_are_captured_on_the_stream_that_they_were_tried_on(cuda: Cuda) -> None:
    runs: list[tuple[Stream, object, object]] = []
    out = torch.zeros(1)

    def run() -> Tensor:
        runs.append((cuda.now, cuda.checks, cuda.capturing))
        return out

    capture = CudaCapture(DEVICE)
    for _ in range(2):
        assert capture(run)() is out
    own = runs[0][0]
    assert own is not cuda.default and {stream for stream, *_ in runs} == {own}
    assert own.waited_for == [cuda.default] * 2
    assert cuda.default.waited_for == [own, own]
    mode = {"capture_error_mode": "thread_local"}
    assert [what for *_, what in runs] == [
        None, None, {"pool": None, **mode}, None, None, {"pool": "pool", **mode}
    ]  # fmt: skip
    assert [checks for _, checks, _ in runs] == [0, "error", 0] * 2
    assert cuda.now is cuda.default


def test_a_step_that_cannot_be_captured_leaves_nothing_behind(cuda: Cuda) -> None:
    def waits() -> Tensor:
        if cuda.checks == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.zeros(1)

    with pytest.raises(NotCapturable, match="synchronizing"):
        CudaCapture(DEVICE)(waits)
    assert cuda.checks == 0
    cuda.breaks = True
    with pytest.raises(NotCapturable, match="previous error"):
        CudaCapture(DEVICE)(lambda: torch.zeros(1))
    assert cuda.now is cuda.default
    cuda.lost = True  # which no other way of launching steps makes good
    with pytest.raises(torch.AcceleratorError):
        CudaCapture(DEVICE)(waits)


def test_what_is_brought_to_the_host_has_been_made(cuda: Cuda) -> None:
    copied_on: list[Stream] = []
    tensor: Any = SimpleNamespace(device=DEVICE, cpu=lambda: copied_on.append(cuda.now))
    to_host(tensor)
    assert copied_on[0] is not cuda.default
    assert copied_on[0].waited_for == [cuda.default]
    assert cuda.default.waited_for == []


def test_memory_that_was_given_back_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"held": 3 << 30, "free": 5 << 30}

    def empty_cache() -> None:
        free["free"] += free.pop("held")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["free"], 80 << 30))
    backend: Any = SimpleNamespace(device=DEVICE)
    assert TritonBackend.free_bytes(backend) == 8 << 30


def test_a_gpu_whose_context_is_broken_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [torch.AcceleratorError("CUDA error: an illegal memory access")]

    def synchronize(device: torch.device) -> None:
        if errors:
            raise errors[0]

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    backend: Any = SimpleNamespace(device=DEVICE)
    assert not TritonBackend.works(backend)
    errors.clear()
    assert TritonBackend.works(backend)
