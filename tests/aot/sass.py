"""Reads what `nvdisasm -c` or `cuobjdump -sass` prints: instructions, jumps, main loops.

A main loop is an innermost loop with matrix instructions, or without any of those in the program
its longest innermost loop, or without a loop the program itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from aot.flow import Code, Instruction, innermost, natural_loops

LABEL = re.compile(r"^\s*(\.L_\w+):")
ADDRESSED = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/")
INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<op>[A-Z]\w*(?:\.\w+)*)"
    r"\s*(?P<operands>[^;]*);"
)
LABELS = re.compile(r"\.L_\w+")
ABSOLUTE = re.compile(r"(?:^|[ ,])(0x[0-9a-f]+)$")
JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"}
ENDS = JUMPS | {"EXIT", "RET"}
COPIES = {"LD", "LDG", "LDGSTS", "UTMALDG", "UBLKCP"}


@dataclass(frozen=True)
class Loop:
    """What one iteration holds, in instructions (of one thread).

    mma: matrix instructions. copies: out of global memory, `wide` of them of 16 bytes or more.
    sts: stores to shared memory. i2f: conversions from integer to float.
    """

    instructions: int
    mma: int
    copies: int
    wide: int
    sts: int
    i2f: int


@dataclass(frozen=True)
class Program:
    """local: loads and stores of local memory. mma: the matrix instruction, or "-"."""

    local: int
    mma: str
    loops: tuple[Loop, ...]


def read(text: str) -> Program:
    """What the gate wants to know of a disassembled kernel, its main loop first in `loops`.

    Raises ValueError if `text` has no instructions, or a line that looks like one and is not
    understood, or jumps to an unknown place: what is passed over would flatter the figures.
    """
    code = parse(text)
    if not code:
        raise ValueError("no instructions in the disassembly")
    mma = next((i.base for i in code if is_mma(i)), "-")
    local = sum(i.base in ("LDL", "STL") for i in code)
    return Program(local, mma, tuple(map(_loop, main_loops(code))))


def parse(text: str) -> Code:
    """The instructions of every function in `text`; jumps are resolved to indices."""
    matches: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    addresses: list[dict[int, int]] = [{}]
    function: list[int] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(matches)
        elif match := INSTRUCTION.match(line):
            address = int(match["address"], 16)
            if address in addresses[-1]:
                addresses.append({})
            addresses[-1][address] = len(matches)
            function.append(len(addresses) - 1)
            matches.append(match)
        elif ADDRESSED.match(line):
            raise ValueError(f"not understood: {line.strip()}")
    return [_instruction(m, labels, addresses[f]) for m, f in zip(matches, function, strict=True)]


def main_loops(code: Code) -> list[Code]:
    """The instructions of every main loop, in program order."""
    loops = natural_loops(code)
    if any(is_mma(i) for i in code):
        found = innermost([body for body in loops if any(is_mma(code[i]) for i in body)])
    else:
        found = sorted(innermost(loops), key=len)[-1:]
    return [[code[i] for i in sorted(body)] for body in found] or [code]


def is_mma(instruction: Instruction) -> bool:
    """HMMA, IMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100) and their like."""
    return "MMA" in instruction.base


def is_copy(instruction: Instruction) -> bool:
    """Out of global memory, to registers or to shared memory."""
    return instruction.base in COPIES


def _instruction(
    match: re.Match[str], labels: dict[str, int], addresses: dict[int, int]
) -> Instruction:
    base = match["op"].split(".", 1)[0]
    operands = match["operands"].strip()
    targets: tuple[int, ...] = ()
    if base in JUMPS or base == "CALL":
        targets = _targets(operands, labels, addresses)
    if base in JUMPS and not targets:
        raise ValueError(f"a jump to an unknown place: {match[0].strip()}")
    # a branch may also be conditional by a first operand: `BRA.U UP0, ...`, `BRA.DIV UR4, ...`
    conditional = match["guard"] is not None or (base == "BRA" and operands[:1] not in ("`", "0"))
    return Instruction(match["op"], targets, falls=base not in ENDS or conditional)


def _targets(operands: str, labels: dict[str, int], addresses: dict[int, int]) -> tuple[int, ...]:
    named = LABELS.findall(operands)
    if named:
        return tuple(labels[name] for name in named if name in labels)
    found = ABSOLUTE.search(operands)
    address = int(found[1], 16) if found else -1
    return (addresses[address],) if address in addresses else ()


def _loop(body: Code) -> Loop:
    copies = [i for i in body if is_copy(i)]
    return Loop(
        instructions=len(body),
        mma=sum(map(is_mma, body)),
        copies=len(copies),
        wide=sum(map(_is_wide, copies)),
        sts=sum(i.base in ("STS", "STSM") for i in body),
        i2f=sum(i.base in ("I2F", "I2FP") for i in body),
    )


def _is_wide(copy: Instruction) -> bool:
    bulk = copy.base in ("UTMALDG", "UBLKCP")
    return bulk or not {"128", "256"}.isdisjoint(copy.op.split("."))
