"""Run as a script: which compiled forms steps ask Triton for, beside those that are made at the
start. It needs no GPU and compiles nothing: Triton says what it would compile. Prints of every
case how many are made, and each that is asked for and not made, or made and not asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # so that the folder is a package
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter asks for nothing

import torch  # noqa: E402
import triton  # noqa: E402
from aot.serving import (  # noqa: E402
    ARCH,
    BLOCK,
    HOST,
    NORMS,
    Driver,
    Group,
    Layer,
    be_served,
    mixes,
)

from deltaserve.kernels.gpu import config  # noqa: E402
from deltaserve.kernels.gpu.arena import Arena  # noqa: E402
from deltaserve.kernels.gpu.base import GpuLinear  # noqa: E402
from deltaserve.kernels.gpu.config import BUCKETS, GemmConfig  # noqa: E402
from deltaserve.kernels.gpu.embedding import GpuEmbeddingDeltas  # noqa: E402
from deltaserve.kernels.gpu.layer_variants import of_layer, of_norm, spec_of_layer  # noqa: E402
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas  # noqa: E402
from deltaserve.kernels.gpu.precompile import compile_variant  # noqa: E402
from deltaserve.kernels.gpu.variant import Variant  # noqa: E402
from deltaserve.kernels.gpu.variants import embedding_variant, of_group, spec_of  # noqa: E402
from deltaserve.kernels.primitives import LowRank, Replace  # noqa: E402
from deltaserve.kernels.segments import Segments  # noqa: E402

SIZES = (*BUCKETS, 512)
STEPS = (1, 2, 3, 8, 9, 32, 33, 96, 97, 192, 193, 512)
"""Numbers of tokens: the most or the fewest of each bucket."""
TUNED = {
    "16": asdict(GemmConfig(16, 32, 64, 2, "after", 2, 3)),
    "64": asdict(GemmConfig(32, 64, 32, 1, "sums", 4, 4)),
}
"""A table of measurements, by tokens, that is not what the rule would say."""
MEASURED = {**dict.fromkeys(map(str, SIZES), TUNED["16"]), "1024": TUNED["64"]}
"""One that leaves to the rule nothing but more tokens than are compiled for."""
BF16, FP16, FP32, OUTS = torch.bfloat16, torch.float16, torch.float32, (128, 64)
GROUPS: dict[str, dict[str, Any]] = {
    "int4": {"quantize": "int4", "bias": True},
    "int4 with broken zeros": {"quantize": "int4", "whole": False},
    "int4 in groups of 32, ordered": {"quantize": "int4", "group_size": 32, "ordered": True},
    "int4 in float32": {"quantize": "int4", "dtype": FP32},
    "int4 of one module": {"quantize": "int4", "outs": (192,)},
    "int8": {"quantize": "int8"},
    "int4, activations of int8": {"quantize": "int4", "activations": "int8"},
    "fp8 of four modules": {"quantize": "fp8", "outs": (64, 64, 64, 32)},
    "dense": {"quantize": "none", "dtype": FP16},
}
LAYERS: dict[str, dict[str, Any]] = {
    "int4": {"quantize": "int4", "head_norms": True},
    "int4 in groups of 32, ordered": {"quantize": "int4", "group_size": 32, "ordered": True},
    "int8, gate and up joined": {"quantize": "int8", "joined": True, "bias": True},
    "int8, activations of int8": {"quantize": "int8", "activations": "int8"},
    "dense with windows": {"quantize": "none", "window": 300, "softcap": 20.0},
}


class Table(dict[str, Any]):
    """The same of any linear."""

    def get(self, key: str, default: object = None) -> Any:
        return dict(self)


def forms(run: Callable[[], object]) -> dict[tuple[str, str], str]:
    """What Triton is asked for meanwhile: (kernel, Triton's key) -> in words."""
    found: dict[tuple[str, str], str] = {}
    kept: list[tuple[dict[Any, Any], Any]] = []

    def asked(*, fn: Any, key: Any, compile: Any, **_: Any) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[i]: v for (i,), v in compile["constants"].items()}
        found[fn.name, str(key)] = f"{fn.name} {constants}"
        kernels = fn.jit_function.device_caches[compile["device"]][0]
        kernels[key] = "known"  # for whoever asks again
        kept.append((kernels, key))
        return True  # it is not to be compiled

    triton.knobs.runtime.jit_cache_hook = asked
    run()
    triton.knobs.runtime.jit_cache_hook = None
    for kernels, key in kept:
        del kernels[key]
    return found


def compare(what: str, variants: Iterable[Variant], serve: Callable[[int], None]) -> None:
    """Prints what differs."""
    made = forms(lambda: [compile_variant(v, ARCH) for v in variants])
    triton.runtime.driver.set_active(Driver())
    asked = forms(lambda: [serve(tokens) for tokens in STEPS])
    print(f"{what}: {len(made)} forms")
    for title, one, other in (("missing", asked, made), ("unused", made, asked)):
        for form in one.keys() - other.keys():
            print(f"  {title}: {one[form]}")


def group(what: str, dtype: torch.dtype = BF16, outs: tuple[int, ...] = OUTS, **how: Any) -> None:
    own = Group(256, outs, dtype, **how)
    spec = spec_of(own.base, own.deltas.group)
    compare(f"linears, {what}", of_group(spec, SIZES, ARCH), own.serve)
    alone(what, own.base)


def alone(what: str, base: GpuLinear) -> None:
    """A linear that no adapter may act on, with more rows than a step has tokens too."""

    def serve(tokens: int) -> None:
        for rows in (tokens, 2 * tokens, 4 * tokens):
            base(torch.zeros(rows, base.in_features, dtype=base.dtype))

    compare(f"alone, {what}", of_group(spec_of(base, None), SIZES, ARCH), serve)


def layer(what: str, **how: Any) -> None:
    own = Layer(BF16, **how)
    spec = spec_of_layer(own.layer, own.DIM, BLOCK)
    compare(f"layers, {what}", of_layer(spec, SIZES, ARCH), own.serve)


def embedding(hidden: int = 100) -> None:
    deltas = GpuEmbeddingDeltas(50, hidden, BF16, Arena(HOST))
    for slot in range(4):
        primitive = LowRank(torch.randn(3, 50), torch.randn(hidden, 3))
        deltas.install(slot, deltas.prepare((primitive,)))
    weight = torch.zeros(50, hidden, dtype=BF16)

    def serve(tokens: int) -> None:
        mixes = [((i % 5, 0.5),) if i % 5 else () for i in range(tokens)]
        ids = torch.zeros(tokens, dtype=torch.int64)
        deltas.forward(ids, weight[ids], weight, Segments.of([*mixes[1:], ((1, 1.0),)]), 2.5)

    compare("embedding", [embedding_variant(hidden, BF16)], serve)


def norm(hidden: int) -> None:
    """In no layer."""
    deltas, gain = GpuNormDeltas(hidden, BF16, HOST), torch.ones(hidden, dtype=BF16)
    deltas.install(NORMS, deltas.prepare((Replace(torch.ones(hidden)),)))

    def serve(tokens: int) -> None:
        x = torch.zeros(tokens, hidden, dtype=BF16)
        for segments in mixes(tokens):
            deltas.rms(x, gain, 0.0, 1e-5, segments)

    compare(f"alone, a norm of {hidden}", of_norm(hidden, BF16), serve)


if __name__ == "__main__":
    be_served()
    embedding()
    for what, how in GROUPS.items():
        group(what, **how)
    for what, how in LAYERS.items():
        layer(what, **how)
    norm(256)
    config.table = lambda arch: Table(TUNED)
    group("tuned", quantize="int4", whole=False)
    layer("tuned", quantize="int4")
    config.table = lambda arch: Table(MEASURED)
    alone("measured", Group(256, (192,), BF16, quantize="int4").base)
