"""Microseconds of the CPU kernels at the shapes of a 160M and a 1B model.

    python benchmarks/kernels_cpu.py [base] [lowrank] [bit] [sparse]

Weights are rotated over COLD bytes, so that they come from memory as they do in a real step. Each
figure is the median of the calls made within SECONDS, with the smallest in brackets. With one
thread (OMP_NUM_THREADS=1) it is processor time, which holds on a busy machine too.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from deltaserve.kernels.base import BaseLinear, make_linear
from deltaserve.kernels.linear import LinearDeltas
from deltaserve.kernels.primitives import Bit, LowRank, Primitive, SparseCsr
from deltaserve.kernels.segments import Segments

COLD = 192 << 20
SECONDS = 0.4
TOKENS = (1, 4, 16, 64)

# name -> (in_features, out_features of the parts)
GROUPS = {
    "160m.qkv": (768, (768, 768, 768)),
    "160m.o": (768, (768,)),
    "160m.gate_up": (768, (3072, 3072)),
    "160m.down": (3072, (768,)),
    "1b.qkv": (2048, (2048, 512, 512)),
    "1b.o": (2048, (2048,)),
    "1b.gate_up": (2048, (8192, 8192)),
    "1b.down": (8192, (2048,)),
}
KINDS: dict[str, dict[str, object]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8 float32": {"dtype": torch.float32, "quantize": "int8"},
    "int8 bfloat16": {"dtype": torch.bfloat16, "quantize": "int8"},
    "int8 x int8 bfloat16": {
        "dtype": torch.bfloat16,
        "quantize": "int8",
        "activations": "int8",
    },
    "int4 float32": {"dtype": torch.float32, "quantize": "int4"},
    "int4 bfloat16": {"dtype": torch.bfloat16, "quantize": "int4"},
}


def measure(call: Callable[[int], object]) -> str:
    """ "median [minimum]" in microseconds of call(0), call(1), ..."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for i in range(3):
        call(i)
    times: list[float] = []
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop or len(times) < 5:
        begin = clock()
        call(len(times))
        times.append(1e6 * (clock() - begin))
    return f"{statistics.median(times):7.0f} [{min(times):6.0f}]"


def bench_base() -> None:
    for kind, options in KINDS.items():
        for name, (inner, outs) in GROUPS.items():
            out = sum(outs)
            linears: list[BaseLinear] = [
                make_linear(torch.randn(out, inner), None, **options)  # type: ignore[arg-type]
            ]
            copies = max(1, min(64, COLD // linears[0].nbytes))
            linears += [
                make_linear(torch.randn(out, inner), None, **options)  # type: ignore[arg-type]
                for _ in range(copies - 1)
            ]
            cells: list[str] = []
            for tokens in TOKENS:
                x = torch.randn(tokens, inner).to(linears[0].dtype)
                cells.append(measure(lambda i, x=x: linears[i % copies](x)))
            print(f"{kind:22} {name:13} M=1/4/16/64: {'  '.join(cells)}", flush=True)


def bench_deltas(
    label: str, make: Callable[[int, int], Primitive], adapters: int, tokens: int, nbytes: float
) -> None:
    """adapters: distinct, each with `tokens` tokens. nbytes: per weight element of the delta."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, (inner, outs) in GROUPS.items():
            layers = max(1, min(24, int(COLD / (nbytes * adapters * inner * sum(outs)))))
            base = Zero(sum(outs), dtype)
            runs = [(i * tokens, (i + 1) * tokens, ((i + 1, 1.0),)) for i in range(adapters)]
            segments = Segments(runs, adapters * tokens)
            deltas = [LinearDeltas(inner, outs, dtype) for _ in range(layers)]
            for layer in deltas:
                for slot in range(1, adapters + 1):
                    parts = {p: (make(out, inner),) for p, out in enumerate(outs)}
                    layer.install(slot, layer.prepare(parts))
            x = torch.randn(adapters * tokens, inner).to(dtype)
            base(x)
            cell = measure(lambda i: deltas[i % layers].forward(x, base, segments))
            rate = sum(layer.nbytes for layer in deltas) / layers
            print(
                f"{label} {str(dtype)[6:]:9} {name:13} {cell}  {rate / 1e6:.2f} MB a call",
                flush=True,
            )


class Zero(BaseLinear):
    """A base that costs nothing: what is left is the deltas' own time."""

    def __init__(self, out: int, dtype: torch.dtype) -> None:
        self.out, self.dtype, self.bias = out, dtype, None
        self.y: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.y is None or len(self.y) != len(x):
            self.y = torch.zeros(len(x), self.out, dtype=self.dtype)
        return self.y

    def weight(self) -> torch.Tensor:
        raise NotImplementedError

    def held(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def low_rank(out: int, inner: int) -> LowRank:
    return LowRank(torch.randn(16, inner).bfloat16(), 1e-3 * torch.randn(out, 16).bfloat16(), 1.0)


def bit(out: int, inner: int) -> Bit:
    signs = torch.randint(0, 256, (1, out, -(-inner // 8)), dtype=torch.uint8)
    return Bit(signs, 1e-4 * torch.rand(1, out))


def csr(out: int, inner: int) -> SparseCsr:
    per_row = inner // 100
    columns = torch.rand(out, inner).topk(per_row).indices.sort(1).values.flatten().int()
    indptr = torch.arange(out + 1) * per_row
    return SparseCsr(indptr, columns, 1e-3 * torch.randn(out * per_row))


def main(wanted: list[str]) -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if not wanted or "base" in wanted:
        bench_base()
    if not wanted or "lowrank" in wanted:
        for tokens in (1, 4, 64):
            bench_deltas(f"16 LowRank r=16, {tokens:2} tokens each", low_rank, 16, tokens, 0.08)
        bench_deltas(" 1 LowRank r=16,  1 token each ", low_rank, 1, 1, 0.08)
    if not wanted or "bit" in wanted:
        for tokens in (1, 4, 64):
            bench_deltas(f"16 Bit, {tokens:2} tokens each", bit, 16, tokens, 0.125)
        bench_deltas(" 1 Bit,  1 token each ", bit, 1, 1, 0.125)
    if not wanted or "sparse" in wanted:
        for tokens in (1, 4, 64):
            bench_deltas(f" 4 CSR of 1 %, {tokens:2} tokens each", csr, 4, tokens, 0.08)


if __name__ == "__main__":
    main(sys.argv[1:])
