"""The same base and adapters in an engine on the CPU and in one on the Triton kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apart
import pytest
import torch
from graph_double import RecordedCapture
from rig import load_base, running

from deltaserve.kernels.backend import Backend
from deltaserve.kernels.cpu_backend import CpuBackend
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.server.engine.collector import Answer, generate
from deltaserve.server.engine.core import Request
from deltaserve.server.engine.engine import Engine
from deltaserve.server.model import BaseModel

TOLERANCE = 1e-4


@contextmanager
def on_gpu() -> Iterator[TritonBackend]:
    """The real one where there is one, else a device whose memory is apart from the host's."""
    if torch.cuda.is_available():
        yield TritonBackend()
        return
    with apart.backend() as found:
        yield found


def prompt(seed: int, length: int = 6) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 250, (length,), generator=generator).tolist()


@dataclass
class Pair:
    """The same base and adapters in two engines."""

    cpu: Engine
    gpu: Engine
    model: BaseModel

    def same(self, asked: Mapping[str, Request]) -> dict[str, Answer]:
        """Both give the same, and it is returned: what the GPU gave."""
        found = [
            dict(zip(asked, generate(engine, asked.values(), timeout=120), strict=True))
            for engine in (self.cpu, self.gpu)
        ]
        for what, right in found[0].items():
            check(found[1][what], right, what)
        return found[1]


def check(got: Answer, want: Answer, what: str) -> None:
    assert got.token_ids == want.token_ids, what
    assert len(got.logprobs) == len(want.logprobs) and got.text == want.text, what
    prompts = zip(got.prompt_logprobs, want.prompt_logprobs, strict=True)
    pairs = [*zip(got.logprobs, want.logprobs, strict=True), *prompts]
    for ours, theirs in pairs:
        both_missing = math.isnan(ours.logprob) and math.isnan(theirs.logprob)
        assert both_missing or abs(ours.logprob - theirs.logprob) < TOLERANCE, what
    for a, b in zip(got.disagreements, want.disagreements, strict=True):
        assert a.divergence == pytest.approx(b.divergence, abs=TOLERANCE), what


def pair(
    stack: ExitStack,
    gpu: TritonBackend,
    family: Path,
    names: Sequence[str],
    quantize: str = "none",
    captured: bool = False,
    activations: str = "float",
    **config: Any,
) -> Pair:
    """captured: decoding steps are replayed from graphs."""
    engines = []
    made = type(gpu)()
    if captured and made.capture is None:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        made.capture = RecordedCapture(patch, made.workspace.poison)
    backends: list[Backend] = [CpuBackend(), made]
    for backend in backends:
        model = load_base(
            family / "base", quantize=quantize, backend=backend, activations=activations
        )
        engine = stack.enter_context(running(model, [family / "adapters"], **config))
        for name in names:
            engine.adapters.load(name, str(family / "adapters" / name)).result(timeout=60)
        engines.append(engine)
    return Pair(*engines, model)
