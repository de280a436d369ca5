"""The compile gate holds readings to limits and budgets, and says what is over."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from aot import compile, sass
from aot.budgets import Budgets, compare, figures, limits
from aot.compile import Reading, explain, usage
from aot.table import table


def reading(**changes: object) -> Reading:
    loop = sass.Loop(300, mma=16, copies=4, wide=3, sts=2, i2f=0)
    good = Reading(
        name="bit",
        arch=90,
        seconds=0.5,
        registers=94,
        local=0,
        shared=22528,
        threads=128,
        weights=64 * 256,
        program=sass.Program(0, "HGMMA", (loop,)),
        unrolled=(1,),
    )
    changed = {k: v for k, v in changes.items() if hasattr(good, k)}
    in_loop = {k: v for k, v in changes.items() if k not in changed}
    return replace(
        replace(good, program=sass.Program(0, "HGMMA", (replace(loop, **in_loop),))), **changed
    )


BUDGET = {"registers": 94, "wide": 3, "narrow": 1, "sts": 2, "per_weight": 2.34}


def test_a_budget_is_what_was_measured() -> None:
    assert figures(reading()) == BUDGET
    assert figures(reading(instructions=600, unrolled=(2,))) == BUDGET
    assert not list(compare(reading(), BUDGET))


def test_further_loops_count_too() -> None:
    first = reading().program.loops[0]
    further = replace(first, instructions=900, copies=9, wide=1, sts=5, i2f=7)
    both = reading(program=sass.Program(0, "HGMMA", (first, further)), unrolled=(1, 1))
    assert figures(both) == BUDGET | {"wide": 4, "narrow": 9, "sts": 7}


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"registers": 95}, "95 registers, budget 94"),
        ({"copies": 5}, "2 copies below 16 bytes in its loops, budget 1"),
        ({"sts": 3}, "3 STS in its loops, budget 2"),
        ({"instructions": 331}, "2.59 instructions per weight in the main loop, budget 2.34"),
        ({"wide": 0, "copies": 1}, "no 16-byte copies in the main loop, its 1 are all narrower"),
        ({"i2f": 1}, "1 I2F in the main loop, must be 0"),
    ],
)
def test_over_budget(changes: dict[str, object], failure: str) -> None:
    found = list(compare(reading(**changes), BUDGET))
    assert found[0].startswith(f"bit sm_90: {failure}")


def test_ten_percent_more_instructions_are_within_budget() -> None:
    assert not list(compare(reading(instructions=329), BUDGET))


def test_a_kernel_without_weights_keeps_its_wide_copies() -> None:
    plain = {key: value for key, value in BUDGET.items() if key != "per_weight"}
    assert not list(compare(reading(weights=0, i2f=9), plain))
    lost = list(compare(reading(weights=0, wide=0, copies=1), plain))
    assert lost == ["bit sm_90: no 16-byte copies in its loops, budget 3"]


def test_tcgen05_loops_are_not_counted_by_weight() -> None:
    assert "per_weight" not in figures(reading(arch=100))
    assert not list(compare(reading(arch=100, instructions=9999), BUDGET))


def test_limits_hold_with_any_compiler() -> None:
    assert not list(limits(reading(shared=227 * 1024)))
    (shared,) = limits(reading(arch=89, shared=99 * 1024 + 1))
    assert shared.startswith("bit sm_89: 101377 bytes of shared memory, the architecture offers")
    (stack,) = limits(reading(local=16))
    assert stack.startswith("bit sm_90: 16 bytes of local memory")
    (spill,) = limits(reading(program=replace(reading().program, local=2)))
    assert "2 loads and stores of it, must be 0" in spill


def test_no_budget_says_how_to_add_one() -> None:
    (failure,) = compare(reading(), None)
    assert failure.startswith("bit sm_90: no budget") and "gate.py --update" in failure
    (failure,) = compare(reading(), {k: v for k, v in BUDGET.items() if k != "sts"})
    assert "no budget for STS in its loops" in failure


def test_a_budget_without_a_variant_fails() -> None:
    budgets = Budgets("3.9.0", {"bit": {90: BUDGET}, "gone": {90: BUDGET}})
    (failure,) = budgets.orphans({"bit"})
    assert failure.startswith("gone: a budget without a variant")


def test_budgets_are_updated_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    budgets = Budgets.load(path)
    assert budgets.update([reading()], {"bit"}, "3.9.0")[1].startswith("bit sm_90: added registers")
    budgets.save(path)
    budgets = Budgets.load(path)
    assert budgets == Budgets("3.9.0", {"bit": {90: BUDGET}})
    assert budgets.update([reading()], {"bit"}, "3.9.0") == []
    assert budgets.update([reading(registers=90)], {"bit"}, "3.9.0") == [
        "bit sm_90: registers 94 -> 90"
    ]
    assert budgets.update([], {"other"}, "3.9.0") == ["bit: removed"]
    budgets.save(path)
    assert Budgets.load(path) == Budgets("3.9.0", {})


def test_budgets_of_another_triton_are_forgotten() -> None:
    budgets = Budgets("3.8.0", {"bit": {80: BUDGET}})
    budgets.update([reading()], {"bit"}, "3.9.0")
    assert budgets == Budgets("3.9.0", {"bit": {90: BUDGET}})


def test_the_usage_of_registers_and_stack() -> None:
    line = "  REG:96 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[2]:8 CONSTANT[0]:504 TEXTURE:0"
    assert usage(line) == (96, 12)


def test_of_a_refusal_only_the_lines_of_ptxas_are_shown() -> None:
    error = "PTXASError: `ptxas` failed with error code 255\nptxas info    : 3 bytes gmem"
    output = (
        "ptxas /tmp/a.ptx, line 32; error   : needs sm_90\n"
        "ptxas fatal   : Ptx assembly aborted\n.version 8.7\n.target sm_80\n"
    )
    assert explain(error, output) == (
        "ptxas line 32; error   : needs sm_90\nptxas fatal   : Ptx assembly aborted"
    )
    assert (
        explain("ValueError: odd", "a.py:3: error: no\nnoise")
        == "ValueError: odd\na.py:3: error: no"
    )


def test_of_a_compile_error_the_line_and_the_reason_are_shown() -> None:
    error = "CompilationError: at 2:29:\ndef f():\n    tl.dot(\n    ^\nK is below 16"
    assert explain(error, "noise") == "CompilationError: at 2:29:\ntl.dot(\nK is below 16"


def test_the_table_has_a_row_for_each_main_loop() -> None:
    program = replace(reading().program, loops=reading().program.loops * 2)
    two = reading(program=program, unrolled=(2, 1))
    rows = table([two, compile.Refusal("odd", 80, "no")]).splitlines()
    assert " ".join(rows[1].split()) == "bit 90 94 0 22528 HGMMA 2 3/4 1.17 2 0 0.5"
    assert " ".join(rows[2].split()) == "loop 2 3/4 300 i 2 0"
    assert rows[3].split() == ["odd", "80", "refused"]


def test_two_variants_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [SimpleNamespace(name="bit"), SimpleNamespace(name="bit")]
    monkeypatch.setitem(sys.modules, "twins", SimpleNamespace(all_variants=lambda arch: twins))
    with pytest.raises(ValueError, match="more than one variant named bit"):
        compile.variants("twins", 90)
