"""The whole engine on the GPU, with graphs and without, beside the engine on the CPU: every variant
of the zoo in one mixed batch. The CPU scores what the GPU has said, so that a tie does not part
them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu_kernels.data import ON_GPU

if TYPE_CHECKING:
    from deltaserve.kernels.backend import Backend
    from deltaserve.server.engine.collector import Answer
    from deltaserve.server.engine.text import Text
    from gpu_kernels.check import Report

ZOO = Path(__file__).parents[2] / "demo" / "zoo"
GROUP = 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Of a log-probability. In bfloat16 each of some fifty products and norms of a token is rounded
once, in another order than on the CPU."""
ROUGH = 0.3
"""Where activations are rounded to 8 bits: what differs by a rounding before rounds to the next
whole number now and then."""

Form = tuple[str, torch.dtype, str]
"""(weights, dtype, activations)"""
FORMS: tuple[Form, ...] = (
    ("none", torch.float32, "float"),
    ("int4", torch.float32, "float"),
    ("none", torch.bfloat16, "float"),
    ("int8", torch.bfloat16, "float"),
    ("int4", torch.bfloat16, "float"),
    ("int8", torch.bfloat16, "int8"),
    ("int4", torch.float32, "int8"),
)
SEQUENCES = 32
"""More than are asked at once; each number of tokens up to it is compiled for and captured."""
_ids = count()


@dataclass(frozen=True)
class Asked:
    """A request. mix: (adapter, strength)."""

    name: str
    mix: Sequence[tuple[str, float]]
    prompt: tuple[int, ...]


def engines(report: Report, form: Form, quick: bool) -> None:
    """quick: few variants and tokens, for the interpreter."""
    quantize, dtype, activations = form
    what = f"engine {quantize} {str(dtype).removeprefix('torch.')}"
    what += " activations int8" if activations == "int8" else ""
    with report.attempt(what):
        from deltaserve.kernels.gpu.backend import TritonBackend
        from deltaserve.server.engine.text import Text

        variants = json.loads((ZOO / "zoo.json").read_text())["variants"]
        if quick:
            variants = [v for v in variants if v["kind"] in ("LoRA", "BitDelta")][-2:]
        names = [v["name"] for v in variants]
        mixes: list[tuple[str, list[tuple[str, float]], str]] = [("base", [], "task: fig =")]
        mixes += [(v["name"], [(v["name"], 1.0)], _prompt(v["skill"])) for v in variants]
        mixes.append(("two of them", [(names[0], 0.5), (names[-1], 0.5)], "copy: one two ="))
        text = Text(ZOO / "base")
        asked = [Asked(n, mix, tuple(text.backend.encode(said).ids)) for n, mix, said in mixes]
        compare(
            report, what, asked,
            lambda backend, eager: _engine(backend, names, form, text, eager),
            TritonBackend(), 2 if quick else 24,
            TOLERANCE[dtype] if activations == "float" else ROUGH, captures=True,
        )  # fmt: skip


def compare(
    report: Report,
    what: str,
    asked: Sequence[Asked],
    open_engine: Callable[[Backend, bool], AbstractContextManager[Any]],
    gpu: Backend,
    tokens: int,
    tolerance: float,
    captures: bool = False,
) -> None:
    """open_engine: with a backend, and whether every step is launched kernel by kernel. tolerance:
    of the log-probabilities of prompts and answers, and of how far behind the best a chosen token
    may be. Where steps can be captured, those that are replayed have a batch of their own, as one
    that is not keeps all others from it; and the engine runs a second time without."""
    from deltaserve.kernels.cpu_backend import CpuBackend
    from deltaserve.server.engine.collector import generate

    forms: list[tuple[str, Sequence[Asked], list[Answer]]] = []
    for eager in (False, True) if ON_GPU else (True,):
        with open_engine(type(gpu)(), eager) as engine:
            lots = [asked]
            if captures and ON_GPU and not eager:
                report.fact(f"{what}, steps are captured", engine._runner._graphs is not None)
            if engine._runner._graphs is not None:
                lots.append(replayed(engine, asked, generate))
                report.fact(f"{what}, {len(lots[1])} of them replayed", bool(lots[1]))
            for lot in filter(None, lots):
                before = engine._runner.replays
                requests = [
                    _request(a.prompt, a.mix, max_tokens=tokens, logprobs=0, score_from=1)
                    for a in lot
                ]
                answers = generate(engine, requests, timeout=300)
                made = engine._runner.replays - before
                forms.append((f", {made} steps from graphs", lot, answers))
    for form, lot, ours in forms:
        with open_engine(CpuBackend(), True) as engine:
            requests = [
                _request(a.prompt + answer.token_ids, a.mix, max_tokens=0, score_from=1,
                         prompt_logprobs=1)
                for a, answer in zip(lot, ours, strict=True)
            ]  # fmt: skip
            theirs = generate(engine, requests, timeout=300)
        for a, answer, scored in zip(lot, ours, theirs, strict=True):
            found = [*answer.prompt_logprobs, *answer.logprobs]
            pairs = list(zip(found, scored.prompt_logprobs, strict=True))
            error = max(abs(x.logprob - y.logprob) for x, y in pairs)
            behind = max(y.top[0][1] - y.logprob for _, y in pairs[-tokens:])
            right = len(pairs) == len(a.prompt) - 1 + tokens and max(error, behind) < tolerance
            report.fact(f"{what}{form}, {a.name}: {error:.1e}, {behind:.1e} behind the best", right)


def replayed(engine: Any, asked: Sequence[Asked], generate: Callable[..., Any]) -> list[Asked]:
    """Those whose steps are replayed from graphs when they are alone."""
    found = []
    for a in asked:
        before = engine._runner.replays
        generate(engine, [_request(a.prompt, a.mix, max_tokens=3)], timeout=300)
        if engine._runner.replays > before:
            found.append(a)
    return found


@contextmanager
def _engine(
    backend: Backend, names: Sequence[str], form: Form, text: Text, eager: bool
) -> Iterator[Any]:
    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.model import load

    quantize, dtype, activations = form
    model = load(
        ZOO / "base", dtype=dtype, quantize=quantize, group_size=GROUP, backend=backend,
        max_length=256, activations=activations,
    )  # fmt: skip
    config = EngineConfig(
        kv_cache_bytes=32 << 20,
        max_batch_tokens=256 if ON_GPU else 64,
        max_sequences=SEQUENCES,
        enforce_eager=eager,
    )
    engine = make_engine(model, config, AdapterConfig(roots=(ZOO,), bytes=256 << 20), text=text)
    engine.start()
    try:
        loads = [engine.adapters.load(name, str(ZOO / _path(name))) for name in names]
        for load_of in loads:
            load_of.result(timeout=120)
        yield engine
    finally:
        engine.shutdown()


def _request(prompt: Sequence[int], mix: Sequence[tuple[str, float]], **sampling: Any) -> Any:
    from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams

    adapters = tuple(AdapterRef(name, strength) for name, strength in mix)
    given = SamplingParams(ignore_eos=True, **sampling)
    return Request(f"check-{next(_ids)}", tuple(prompt), given, adapters)


def _path(name: str) -> str:
    variants = json.loads((ZOO / "zoo.json").read_text())["variants"]
    return next(str(v["path"]) for v in variants if v["name"] == name)


def _prompt(skill: str) -> str:
    line = (ZOO / "held_out" / f"{skill}.jsonl").read_text().splitlines()[0]
    return str(json.loads(line)["prompt"])
