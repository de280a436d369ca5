"""What a reading may cost: limits that hold anywhere, and committed budgets of one Triton."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aot.compile import Reading

ARCHS = (80, 89, 90, 100)
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of one program
SLACK = 1.1  # instructions per weight may exceed their budget by so much
ADD = "`python tests/aot/gate.py --update`"

Figures = Mapping[str, float]


@dataclass
class Budgets:
    """Figures by variant and architecture, as the Triton of that version compiled them."""

    triton: str = ""
    variants: dict[str, dict[int, Figures]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Budgets:
        """An absent file is one without budgets."""
        if not path.exists():
            return cls()
        content = json.loads(path.read_text())
        variants = {
            name: {int(arch): figures for arch, figures in by_arch.items()}
            for name, by_arch in content["variants"].items()
        }
        return cls(content["triton"], variants)

    def save(self, path: Path) -> None:
        """One line an architecture, so that a diff shows what became dearer."""
        blocks = []
        for name, by_arch in sorted(self.variants.items()):
            lines = [f'   "{arch}": {json.dumps(by_arch[arch])}' for arch in sorted(by_arch)]
            blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        variants = "{\n" + ",\n".join(blocks) + "\n }" if blocks else "{}"
        path.write_text(f'{{\n "triton": "{self.triton}",\n "variants": {variants}\n}}\n')

    def update(self, readings: Iterable[Reading], names: set[str], triton: str) -> list[str]:
        """Take the readings as budgets, drop variants not in `names`; returns what changed."""
        changes = []
        if self.triton != triton:
            changes.append(f"triton {self.triton or 'unknown'} -> {triton}: all budgets anew")
            self.triton, self.variants = triton, {}
        for name in sorted(set(self.variants) - names):
            del self.variants[name]
            changes.append(f"{name}: removed")
        for reading in readings:
            by_arch = self.variants.setdefault(reading.name, {})
            old, new = by_arch.get(reading.arch), figures(reading)
            if old != new:
                by_arch[reading.arch] = new
                changes.append(f"{reading.name} sm_{reading.arch}: {_difference(old, new)}")
        return changes

    def orphans(self, names: set[str]) -> list[str]:
        """Failures of budgets that belong to no variant."""
        return [
            f"{name}: a budget without a variant; remove it with {ADD}"
            for name in sorted(set(self.variants) - names)
        ]


def figures(reading: Reading) -> dict[str, float]:
    """What a budget holds of a reading: copies and stores of one turn of every main loop."""
    loops = reading.program.loops
    found: dict[str, float] = {
        "registers": reading.registers,
        "wide": sum(loop.wide for loop in loops),
        "narrow": sum(loop.copies - loop.wide for loop in loops),
        "sts": sum(loop.sts for loop in loops),
    }
    per_weight = reading.instructions_per_weight
    return found if per_weight is None else found | {"per_weight": round(per_weight, 2)}


def limits(reading: Reading) -> Iterator[str]:
    """Failures that are failures with any compiler."""
    where = f"{reading.name} sm_{reading.arch}"
    if reading.local or reading.program.local:
        yield (
            f"{where}: {reading.local} bytes of local memory and {reading.program.local} loads "
            "and stores of it, must be 0: the registers spill"
        )
    if reading.shared > SHARED[reading.arch]:
        yield (
            f"{where}: {reading.shared} bytes of shared memory, the architecture offers "
            f"{SHARED[reading.arch]}"
        )


def compare(reading: Reading, budget: Figures | None) -> Iterator[str]:
    """Failures against the budget and against the rules of loops that read weights."""
    where = f"{reading.name} sm_{reading.arch}"
    main, found = reading.program.loops[0], figures(reading)
    if reading.weights and main.copies and not main.wide:
        yield f"{where}: no 16-byte copies in the main loop, its {main.copies} are all narrower"
    if reading.weights and main.i2f:
        yield f"{where}: {main.i2f} I2F in the main loop, must be 0: unpack by AND and OR"
    if budget is None:
        yield f"{where}: no budget; if its row is as it should be, add it with {ADD}"
        return
    if budget.get("wide") and not found["wide"]:
        yield f"{where}: no 16-byte copies in its loops, budget {budget['wide']}"
    for key, name in MEASURES.items():
        allowed = budget.get(key)
        if key not in found:
            continue
        if allowed is None:
            yield f"{where}: no budget for {name}; add it with {ADD}"
        elif found[key] > allowed * (SLACK if key == "per_weight" else 1):
            yield f"{where}: {found[key]:g} {name}, budget {allowed:g}"


MEASURES = {
    "registers": "registers",
    "narrow": "copies below 16 bytes in its loops",
    "sts": "STS in its loops",
    "per_weight": "instructions per weight in the main loop",
}


def _difference(old: Figures | None, new: Figures) -> str:
    if old is None:
        return "added " + ", ".join(f"{key} {value:g}" for key, value in new.items())
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key, '-')} -> {new.get(key, '-')}" for key in keys)
