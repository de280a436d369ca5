"""The whole engine on the GPU beside the engine on the CPU: every variant of the zoo in one mixed
batch. The CPU scores what the GPU has said, so that a tie does not part them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu_kernels.data import ON_GPU

if TYPE_CHECKING:
    from gpu_kernels.check import Report

ZOO = Path(__file__).parents[2] / "demo" / "zoo"
GROUP = 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Of a log-probability. In bfloat16 each of some fifty products and norms of a token is rounded
once, in another order than on the CPU."""

FORMS: tuple[tuple[str, torch.dtype], ...] = (
    ("none", torch.float32),
    ("int4", torch.float32),
    ("none", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("int4", torch.bfloat16),
)
_ids = count()


def engines(report: Report, quantize: str, dtype: torch.dtype, quick: bool) -> None:
    """quick: few variants and tokens, for the interpreter."""
    what = f"engine {quantize} {str(dtype).removeprefix('torch.')}"
    with report.attempt(what):
        variants = json.loads((ZOO / "zoo.json").read_text())["variants"]
        if quick:
            variants = [v for v in variants if v["kind"] in ("LoRA", "BitDelta")][-2:]
        names = [v["name"] for v in variants]
        asked = [("", "task: fig ="), *((v["name"], _prompt(v["skill"])) for v in variants)]
        mixes: list[tuple[str, list[tuple[str, float]], str]] = [
            (name or "base", [(name, 1.0)] if name else [], prompt) for name, prompt in asked
        ]
        mixes.append(("two of them", [(names[0], 0.5), (names[-1], 0.5)], "copy: one two ="))
        _compare(report, what, mixes, names, quantize, dtype, 2 if quick else 24)


def _compare(
    report: Report,
    what: str,
    mixes: Sequence[tuple[str, list[tuple[str, float]], str]],
    names: Sequence[str],
    quantize: str,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    from deltaserve.kernels.backend import CpuBackend
    from deltaserve.kernels.gpu.backend import TritonBackend
    from deltaserve.server.engine.collector import generate

    with _engine(TritonBackend(), names, quantize, dtype) as engine:
        encode = engine.tokenizer.encode
        prompts = [tuple(encode(text).ids) for _, _, text in mixes]
        asked = [
            _request(prompt, mix, max_tokens=tokens, logprobs=0)
            for prompt, (_, mix, _) in zip(prompts, mixes, strict=True)
        ]
        ours = generate(engine.engine, asked, timeout=300)
    with _engine(CpuBackend(), names, quantize, dtype) as engine:
        asked = [
            _request(prompt + answer.token_ids, mix, max_tokens=0, score_from=len(prompt),
                     prompt_logprobs=1)
            for prompt, answer, (_, mix, _) in zip(prompts, ours, mixes, strict=True)
        ]  # fmt: skip
        theirs = generate(engine.engine, asked, timeout=300)
    for (name, _, _), answer, scored in zip(mixes, ours, theirs, strict=True):
        pairs = list(zip(answer.logprobs, scored.last.prompt_logprobs, strict=True))
        error = max(abs(a.logprob - b.logprob) for a, b in pairs)
        behind = max(b.top[0][1] - b.logprob for _, b in pairs)
        right = len(pairs) == tokens and max(error, behind) < TOLERANCE[dtype]
        report.fact(f"{what}, {name}: {error:.1e}, {behind:.1e} behind the best", right)


class _Running:
    def __init__(self, engine: Any, tokenizer: Any) -> None:
        self.engine = engine
        self.tokenizer = tokenizer


@contextmanager
def _engine(
    backend: Any, names: Sequence[str], quantize: str, dtype: torch.dtype
) -> Iterator[_Running]:
    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.engine.text import Text
    from deltaserve.server.model import load

    model = load(
        ZOO / "base", dtype=dtype, quantize=quantize, group_size=GROUP, backend=backend,
        max_length=256,
    )  # fmt: skip
    text = Text(ZOO / "base")
    config = EngineConfig(kv_cache_bytes=32 << 20, max_batch_tokens=256 if ON_GPU else 64)
    engine = make_engine(model, config, AdapterConfig(roots=(ZOO,), bytes=256 << 20), text=text)
    engine.start()
    try:
        loads = [engine.adapters.load(name, str(ZOO / _path(name))) for name in names]
        for load_of in loads:
            load_of.result(timeout=120)
        yield _Running(engine, text.backend)
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
