"""The readings as a table: one row a binary, one more for each further main loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from aot.compile import Reading, Refusal

HEAD = (
    "variant", "arch", "regs", "spill", "smem", "mma", "x", "16 B", "i/w", "STS", "I2F", "s",
)  # fmt: skip
LEGEND = """\
From "x" on, of one turn of the main loop: how many iterations ptxas made of it, copies out of
global memory of 16 bytes and in all, instructions per weight, stores to shared memory,
conversions from integer to float. Spill and smem are bytes."""


def table(results: Iterable[Reading | Refusal]) -> str:
    """Rows in the order given, columns as wide as their widest entry."""
    rows = [HEAD, *(row for result in results for row in _rows(result))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, LEGEND])


def _rows(result: Reading | Refusal) -> Iterator[tuple[str, ...]]:
    if isinstance(result, Refusal):
        yield (result.name, str(result.arch), "refused", *[""] * (len(HEAD) - 3))
        return
    per_weight = result.instructions_per_weight
    loops = zip(result.program.loops, result.unrolled, strict=True)
    for number, (loop, unrolled) in enumerate(loops, 1):
        copies = f"{loop.wide}/{loop.copies}"
        counts = (str(loop.sts), str(loop.i2f))
        times = str(unrolled) if unrolled > 1 else ""
        if number > 1:
            size = f"{loop.instructions} i"
            yield (f"  loop {number}", *[""] * 5, times, copies, size, *counts, "")
            continue
        yield (
            result.name,
            str(result.arch),
            str(result.registers),
            str(result.local or result.program.local),
            str(result.shared),
            result.program.mma,
            times,
            copies,
            "-" if per_weight is None else f"{per_weight:.2f}",
            *counts,
            f"{result.seconds:.1f}",
        )
