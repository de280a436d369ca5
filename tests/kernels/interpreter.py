"""What Triton's interpreter lacks for testing these kernels.

It holds bfloat16 as integers and computes on their bits, so that products, sums and comparisons are
silently wrong, and casts from float32 truncate. It rounds a fused multiply-add twice, and does not
run the few PTX instructions that the kernels spell out. `complete` gives it all that, for the rest
of the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Words = np.ndarray


def complete() -> None:
    builder = interpreter.InterpreterBuilder
    binary, cast, dot = builder.binary_op, builder.cast_impl, builder.create_dot
    wrap = interpreter.TensorHandle

    def binary_op(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        if not _is_bf16(left):
            return binary(self, left, right, op)
        out = op(_wide(left.data), _wide(right.data))
        if out.dtype == np.bool_:
            return wrap(out, tl.int1)
        return wrap(_narrow(out), tl.bfloat16)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        here, there = source.dtype.scalar, target.scalar
        if here == there or tl.bfloat16 not in (here, there):
            return cast(self, source, target)
        if there == tl.bfloat16:
            return wrap(_narrow(source.data.astype(np.float32)), there)
        return wrap(_wide(source.data).astype(interpreter._get_np_dtype(target)), there)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if _is_bf16(a):
            return wrap(np.matmul(_wide(a.data), _wide(b.data)) + d.data, d.dtype.scalar)
        if a.data.dtype == np.float16:  # products of float16 are summed in float32
            product = np.matmul(a.data.astype(np.float32), b.data.astype(np.float32))
            return wrap(product + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *rest)

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: Sequence[Any], *rest: Any
    ) -> Any:
        words = [v.data.view(np.uint32) for v in values]
        return _Result(wrap(run_ptx(asm, words).view(np.int32), tl.int32))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        assert x.data.dtype == np.float32
        exact = x.data.astype(np.float64) * y.data + z.data
        return wrap(exact.astype(np.float32), z.dtype.scalar)

    builder.binary_op = binary_op
    builder.create_fma = create_fma
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm


def run_ptx(asm: str, inputs: Sequence[Words]) -> Words:
    """$0 of PTX on 32-bit words $1.., in a program whose number on the third axis is 0. Raises
    KeyError for an instruction that it does not know."""
    registers: dict[str, Words] = {f"${i}": word for i, word in enumerate(inputs, 1)}
    registers["%ctaid.z"] = np.zeros_like(inputs[0])
    for statement in asm.strip("{} ").split(";"):
        name, *operands = re.split(r"[\s,]+", statement.strip())
        if not name or name == ".reg":
            continue
        target, *sources = operands
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        registers[target] = PTX[name](*values)
    return registers["$0"]


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit 4 a + 2 b + c of the table, for every bit."""
    out = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            pick = [word if i >> (2 - n) & 1 else ~word for n, word in enumerate((a, b, c))]
            out |= pick[0] & pick[1] & pick[2]
    return out


def _halves(word: Words) -> tuple[Words, Words]:
    return (word & 0xFFFF).astype(np.uint16), (word >> 16).astype(np.uint16)


def _fma(widen: Callable[[Words], Words], narrow: Callable[[Words], Words]) -> Any:
    def fma(a: Words, b: Words, c: Words) -> Words:
        low, high = (
            narrow(widen(x).astype(np.float64) * widen(y) + widen(z)).astype(np.uint32)
            for x, y, z in zip(_halves(a), _halves(b), _halves(c), strict=True)
        )
        return low | high << 16

    return fma


def _wide(bits: Words) -> Words:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: Words) -> Words:
    """To nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (np.where(np.isnan(values), 0x7FC00000, rounded) >> 16).astype(np.uint16)


PTX: dict[str, Callable[..., Words]] = {
    "mov.u32": lambda a: a,
    "add.u32": lambda a, b: a + b,
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma(_wide, _narrow),
    "fma.rn.f16x2": _fma(
        lambda bits: bits.view(np.float16), lambda v: v.astype(np.float16).view(np.uint16)
    ),
}


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


class _Result:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def get_result(self, _: int) -> Any:
        return self.handle
