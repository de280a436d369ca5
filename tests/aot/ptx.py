"""Reads PTX as far as it tells how often ptxas unrolled a loop."""

from __future__ import annotations

import re

from aot.flow import Code, Instruction
from aot.sass import Loop, is_copy, is_mma, main_loops

LABEL = re.compile(r"^(\$L\w+):")
INSTRUCTION = re.compile(
    r"^\s*(?:@(?P<guard>!?%\w+)\s+)?(?P<op>[a-z]\w*(?:[.:]+\w+)*)\s*(?P<operands>[^;]*);"
)
TABLE = re.compile(r"^\s*(\$?\w+):\s*\.branchtargets([^;]*);", re.MULTILINE)
MMA = re.compile(r"(wgmma\.mma_async|mma\.(sync|sp)|tcgen05\.mma)\b")
COPY = re.compile(r"(ld\.global|ld\.relaxed|ld\.acquire|cp\.async\.c[ag]|cp\.async\.bulk)\b")


def parse(text: str) -> Code:
    """The instructions; all but matrix products and copies are called "other"."""
    found: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := INSTRUCTION.match(line):
            found.append(match)
    tables = {name: re.findall(r"\$L\w+", entries) for name, entries in TABLE.findall(text)}
    return [_instruction(match, labels, tables) for match in found]


def unrolled(text: str, loops: tuple[Loop, ...]) -> tuple[int, ...]:
    """How many iterations of each main loop of the PTX one of `loops`, its machine code, does.

    It is 1 where the two cannot be set side by side, so that a count per iteration is then too
    high rather than too low.
    """
    before = main_loops(parse(text))
    if len(before) != len(loops):
        return (1,) * len(loops)
    return tuple(map(_ratio, before, loops))


def _ratio(before: Code, loop: Loop) -> int:
    mma = sum(map(is_mma, before))
    whole, times = (mma, loop.mma) if mma else (sum(map(is_copy, before)), loop.copies)
    return times // whole if whole and times and times % whole == 0 else 1


def _instruction(
    match: re.Match[str], labels: dict[str, int], tables: dict[str, list[str]]
) -> Instruction:
    op = match["op"]
    if MMA.match(op):
        return Instruction("MMA")
    if COPY.match(op):
        return Instruction("LDG")
    if op in ("bra", "bra.uni"):
        target = labels.get(match["operands"].strip())
        if target is None:  # inside inline assembly
            return Instruction("other")
        return Instruction("BRA", (target,), falls=match["guard"] is not None)
    if op == "brx.idx":
        names = tables[match["operands"].rpartition(",")[2].strip()]
        return Instruction("BRX", tuple(labels[name] for name in names), falls=False)
    if op in ("ret", "exit"):
        return Instruction("RET", falls=match["guard"] is not None)
    return Instruction("other")
