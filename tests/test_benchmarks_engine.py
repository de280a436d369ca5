"""benchmarks/gpu.py engine: each part rehearsed on a tiny model, how a run goes on after a failure,
and its tables."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gpu  # noqa: E402
import gpu_serving  # noqa: E402
from gpu_kernels import supervise  # noqa: E402
from gpu_kernels.supervise import Place  # noqa: E402
from gpu_serving import checkpoint, command, parts, peer, report, serving  # noqa: E402
from gpu_serving.adapters import KINDS, delta, lora  # noqa: E402
from gpu_serving.sizes import REHEARSAL, TINY  # noqa: E402
from gpu_serving.streams import request  # noqa: E402

from deltaserve.server.engine.collector import generate  # noqa: E402

Row = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[parts.Stage]:
    """On the CPU's kernels, where a step takes a millisecond."""
    folder = tmp_path_factory.mktemp("engine")
    base = checkpoint.write(folder / "base", TINY)
    with serving.serving(base, folder, REHEARSAL, "off", DEVICE) as served:
        yield parts.Stage(REHEARSAL, served, folder, [])


def rows_of(part: Any, stage: parts.Stage) -> list[Row]:
    rows = list(part(stage))
    for row in rows:
        assert math.isfinite(row["value"]) and row["value"] >= 0, row
        assert (row["goal"] is None) == (row["met"] is None), row
        json.dumps(row)
    return rows


def of(rows: list[Row], what: str) -> list[Row]:
    return [row for row in rows if row["what"] == what]


def test_the_base_is_measured_and_transformers_says_the_same(stage: parts.Stage) -> None:
    assert of(rows_of(parts.start, stage), "start: all")[0]["value"] > 0
    rows = rows_of(parts.base, stage)
    assert [row["batch"] for row in of(rows, "decode")] == list(REHEARSAL.batches)
    for row in of(rows, "decode"):
        assert row["value"] > 0 and row["floor_ms"] > 0 and row["p50_ms"] <= row["p99_ms"]
        assert row["context"] >= REHEARSAL.prompt + REHEARSAL.warm
        assert row["replayed"] == 0  # the engine was told not to use graphs
    past = [{"section": "base", **row} for row in rows]
    found = list(peer.transformers(replace(stage, served=None, past=past)))
    (score,) = of(found, "log-probabilities, from transformers'")
    assert score["met"], score
    beside = of(found, "decode")
    assert [row["batch"] for row in beside] == list(REHEARSAL.batches)
    times = of(found, "decode, to transformers")
    assert len(times) == sum("value" in row for row in beside)
    for row in times:
        theirs = next(r["value"] for r in beside if r["batch"] == row["batch"])
        ours = next(r["value"] for r in of(rows, "decode") if r["batch"] == row["batch"])
        assert row["value"] == pytest.approx(ours / theirs, rel=1e-2)


def test_adapters_are_measured_beside_the_base_and_in_a_batch(stage: parts.Stage) -> None:
    rows = rows_of(parts.adapters, stage)
    assert [row["goal"] for row in rows if row["goal"]] == [">= 0.98", ">= 0.98", ">= 0.5"]
    forms = [row["form"] for row in of(rows, "decode")]
    each = ("base, no adapters", "base, 2 adapters resident", "LoRA, all distinct")
    assert forms == [form for form in each for _ in REHEARSAL.batches]
    before, mixed = of(rows, "decode")[1], of(rows, "decode")[-1]
    assert mixed["floor_ms"] > before["floor_ms"]
    assert len(stage.serving.engine.adapters.list()) == 0
    found = rows_of(parts.bits, stage)
    assert [row["batch"] for row in of(found, "decode")] == [REHEARSAL.bits] * 2


def test_adapters_are_loaded_beside_streams_and_from_cold_files(stage: parts.Stage) -> None:
    rows = rows_of(parts.loads, stage)
    (ratio,) = of(rows, "p99 while loading, to quiet")
    assert ratio["goal"] == "<= 1.05" and len(ratio["load_seconds"]) >= 1
    assert ratio["met"] == (ratio["value"] <= 1.05)
    p99 = [of(rows, f"between tokens, {w}, p99")[0] for w in ("quiet", "one load a second")]
    assert ratio["value"] == pytest.approx(p99[1]["value"] / p99[0]["value"], rel=1e-2)
    (first,) = of(rows, "cold file to first token")
    assert first["value"] > 0 and set(first["page_cache"]) <= {"dropped", "kept", "unknown"}


def test_every_kind_is_measured_and_changes_what_is_answered(stage: parts.Stage) -> None:
    rows = rows_of(parts.kinds, stage)
    assert [row["form"] for row in of(rows, "resident bytes, to file")] == [k.name for k in KINDS]
    assert [row["batch"] for row in of(rows, "decode")] == [len(KINDS)] * 2 + [len(KINDS) - 1]
    folders = [(k.name, stage.folder / "kinds" / k.name) for k in KINDS]
    with stage.serving.loaded(folders) as infos:
        names = ["", *infos]
        asked = [request(REHEARSAL, 0, name, 1, logprobs=3) for name in names]
        answers = generate(stage.serving.engine, asked, 60)
    said = {n: a.logprobs[0].top for n, a in zip(names, answers, strict=True)}
    assert len(set(said.values())) == len(names)


def test_files_are_made_once_and_no_two_are_alike(tmp_path: Path) -> None:
    first, second = (lora(tmp_path / f"{i}", TINY, 4, i) for i in range(2))
    kinds = [delta(tmp_path / f"bits{i}", TINY, KINDS[13], i) for i in range(2)]
    for a, b in ((first, second), kinds):
        files = [next(folder.glob("*.safetensors")) for folder in (a, b)]
        assert files[0].read_bytes() != files[1].read_bytes()
    stamp = (first / "adapter_model.safetensors").stat().st_mtime_ns
    lora(tmp_path / "0", TINY, 4, 0)
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_a_step_is_taken_apart_into_its_kernels(tmp_path: Path) -> None:
    """In the interpreter, or on a GPU."""
    sizes = replace(REHEARSAL, batches=(1,), many=1, resident=1)
    base = checkpoint.write(tmp_path / "base", TINY)
    decoded = {"what": "decode", "engine": "deltaserve", "batch": 1, "form": "base"}
    decoded |= {"graphs": "auto", "p50_ms": 1e6}
    with serving.serving(base, tmp_path, sizes, "off") as served:
        stage = parts.Stage(sizes, served, tmp_path, [decoded, {**decoded, "graphs": "off"}])
        rows = rows_of(parts.floor, stage)
        with served.loaded(parts.loras(stage, 1)) as infos:
            rows += parts.floor_of(stage, list(infos), "LoRA, all distinct")
    alone, adapted = of(rows, "sum of own kernels")
    assert (alone["launches"], adapted["launches"]) == (8 + 2, 12 + 2)  # a layer, last norm, head
    assert alone["value"] == pytest.approx(sum(alone["kernels"].values()), rel=1e-3)
    assert set(adapted["kernels"]) - set(alone["kernels"]) == {"aux_kernel"}
    ratio, launched = of(rows, "step, to its kernels' sum")
    assert launched["graphs"] == "off" and launched["goal"] is None
    assert ratio["value"] == pytest.approx(1e6 / alone["value"], rel=1e-3)
    assert ratio["goal"] == "<= 1.25" and ratio["met"] is False and ratio["graphs"] == "auto"


# Which parts are run, where, and what becomes of failures:


def test_parts_are_run_on_one_engine_and_transformers_without() -> None:
    found = " ".join(map(str, command.steps_of(gpu_serving.PARTS, ("auto", "off"))))
    assert found == (
        "start:auto base:auto adapters:auto floor:off loads:auto bits:auto kinds:auto "
        "base:off transformers:none"
    )
    eager = command.steps_of(("base", "kinds", "floor"), ("off",))
    assert list(map(str, eager)) == ["base:off", "floor:off", "kinds:off"]
    assert list(map(str, command.steps_of(("base", "floor"), ("auto",)))) == [
        "base:auto",
        "floor:off",
    ]


def test_without_an_engine_with_graphs_the_parts_are_made_without() -> None:
    steps = command.steps_of(("base", "loads", "transformers"), ("auto", "off"))
    assert command.start_of(steps) == "auto"
    left = command.without("auto", steps)
    assert list(map(str, left)) == ["base:off", "loads:off", "transformers:none"]
    assert command.start_of(left) == "off"
    assert list(map(str, command.without("off", left))) == ["transformers:none"]


class GaveUp(BaseException):
    pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Processes of a run whose parts yield a row and then do what `does` says of them; returns the
    places they left and the rows that were saved."""
    place, out = tmp_path / "place", tmp_path / "saved.jsonl"

    def give_up() -> None:
        raise GaveUp

    def go(does: dict[str, Any], serve: Any = None, **more: Any) -> tuple[list[str], list[Row]]:
        def part(name: str) -> Any:
            def made(stage: parts.Stage) -> Iterator[Row]:
                yield stage.row(name, 1.0, "x")
                does.get(name, lambda: None)()

            return made

        def served(run: Any, step: Any, graphs: str, stack: Any) -> Any:
            found = argparse.Namespace(graphs=graphs)

            @contextmanager
            def stepping(graphs: str) -> Iterator[None]:
                found.graphs, before = graphs, found.graphs
                yield
                found.graphs = before

            found.stepping = stepping
            return found

        monkeypatch.setattr(command, "give_up", give_up)
        monkeypatch.setattr(command, "_serve", serve or served)
        monkeypatch.setattr(parts, "PARTS", {n: part(n) for n in parts.PARTS})
        monkeypatch.setattr(peer, "transformers", part("transformers"))
        given = {"part": ["base", "loads", "transformers"], "graphs": ["auto", "off"], **more}
        args = argparse.Namespace(
            rehearse="cpu", folder=tmp_path, place=place, out=out, save=False, commit="abc1234",
            **{"seconds": 60.0, **given},
        )  # fmt: skip
        place.write_text("")
        out.write_text("")
        places: list[str] = []
        while True:
            try:
                command.work(args)
            except GaveUp:
                found = Place.read(place)
                assert found is not None and found.seconds <= 60
                places.append(found.part)
                continue
            return places, [json.loads(line) for line in out.read_text().splitlines()]

    return go


def test_each_engine_has_a_process_and_rows_say_where_they_are_from(run: Any) -> None:
    places, rows = run({})
    assert places == ["transformers:none"]
    found = [(row["section"], row["graphs"]) for row in rows]
    each = [("base", "auto"), ("loads", "auto"), ("base", "off"), ("transformers", None)]
    assert found == each
    for row in rows:
        assert row["rehearsal"] and row["part"] == "engine" and row["commit"] == "abc1234"
        assert {"date", "gpu", "torch", "triton", "shape", "goal", "met", "unit"} <= row.keys()


def test_a_part_that_fails_or_hangs_costs_its_own_rows_alone(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("an illegal address")

    _, rows = run({"base": fails}, graphs=["auto"])
    assert [row["what"] for row in rows] == ["base", "base", "loads", "transformers"]
    assert rows[1]["absent"] == "failed, RuntimeError: an illegal address"
    monkeypatch.setattr(command.case, "usable", lambda: False)
    places, _ = run({}, part=["base", "loads"], graphs=["auto"])
    assert places == ["loads:auto", ""]


def test_a_part_whose_process_crashed_is_absent(run: Any) -> None:
    def crashes() -> None:
        raise GaveUp  # ends the process without a word

    places, rows = run({"loads": crashes}, part=["base", "loads", "bits"], graphs=["auto"])
    assert places == ["bits:auto"]
    assert [row["what"] for row in rows] == ["base", "loads", "loads", "bits"]
    assert "the process crashed" in rows[2]["absent"] and rows[2]["graphs"] == "auto"


def test_a_start_that_fails_is_tried_without_graphs(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_server(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(serving, "serving", no_server)
    monkeypatch.setattr(checkpoint, "write", lambda folder, shape, moved: folder)
    places, rows = run({}, command._serve, part=["base", "transformers"], graphs=["auto"])
    assert places == ["base:off transformers:none", "transformers:none"]
    assert [(r["graphs"], "capturing" in r.get("absent", "")) for r in rows[:2]] == [
        ("auto", True),
        ("off", True),
    ]
    assert rows[2]["what"] == "transformers"


def test_a_start_may_take_long_and_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[str] = []
    monkeypatch.setattr(command, "give_up", lambda: None)
    run: Any = argparse.Namespace(absent=lambda step, why: late.append(why), left=lambda: 60.0)
    step = command.Step("start", "auto")
    with command._watch(run, step, 1.0, "it") as watch:
        for _ in range(6):
            time.sleep(0.2)
            watch.moved()
    assert not late
    with command._watch(run, step, 1.0, "it"):
        time.sleep(1.3)
    assert late == ["it was not done after 1 s"]


def test_steps_are_launched_one_by_one_where_that_is_asked_for(stage: parts.Stage) -> None:
    runner = stage.serving.engine._runner
    given: Any = object()
    runner._graphs = given
    try:
        with stage.serving.stepping("off"):
            assert runner._graphs is None and not stage.serving.captured
        with stage.serving.stepping("auto"):
            assert runner._graphs is given
        assert runner._graphs is given
    finally:
        runner._graphs = None


def test_goals_are_judged_once_more_at_the_end(run: Any, stage: parts.Stage) -> None:
    head = {"part": "engine", "graphs": "auto"}
    rows = [stage.row("first", 1.0, "x"), stage.ratio("second", 0.4, 0.5)]
    rows += [stage.ratio("third", 1.2, -1.25), {"what": "fourth", "absent": "failed"}]
    past: Any = argparse.Namespace(past=[{**row, **head} for row in rows])
    count, *lines = command.Run.verdicts(past).strip().splitlines()
    assert count == "2 goals looked at, 1 not met; absent:"
    ends = ("0.4 x (goal >= 0.5, NOT MET)", "1.2 x (goal <= 1.25, met)", "absent: failed")
    assert [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 3


def test_what_does_not_fit_in_the_time_is_named(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    places, _ = run({}, seconds=0.0, graphs=["auto"], part=["base", "loads"])
    assert places == []
    assert "not begun for lack of time: base:auto, loads:auto" in capsys.readouterr().out


def test_the_command_runs_a_rehearsal_and_marks_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, out = tmp_path / "place", tmp_path / "saved.jsonl"
    place.touch()

    def here(words: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", [*words[1:], "--place", str(place)])
        return gpu.main()

    monkeypatch.setattr(supervise, "run", here)
    words = ["engine", "--rehearse", DEVICE, "--part", "start", "--graphs", "off"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--out", str(out)])
    assert gpu.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["what"] for row in rows} >= {"start: load the base", "start: all"}
    assert all(row["rehearsal"] and row["graphs"] == "off" for row in rows)


@pytest.mark.parametrize("how", [{"save": True}, {"out": BENCHMARKS / "results" / "gpu-x.jsonl"}])
def test_a_rehearsal_is_never_saved_among_the_results(how: dict[str, Any]) -> None:
    args = argparse.Namespace(**{"rehearse": "cpu", "save": False, "out": None, **how})
    with pytest.raises(SystemExit, match="not saved in results/"):
        command.check(args)


# The tables, of made-up rows:


def _row(what: str, value: float, unit: str, **more: Any) -> Row:
    machine = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "python": "3.12"}
    head = {"commit": "abc1234", "date": "2026-11-22", "part": "engine", "shape": "8B"}
    where = {"section": "base", "engine": "deltaserve", "graphs": "auto", "batch": 64}
    figure = {"what": what, "value": value, "unit": unit, "goal": None, "met": None}
    return {**machine, **head, **where, **figure, **more}


def _results() -> list[Row]:
    step = {"form": "base", "context": 512, "p50_ms": 4.0, "p99_ms": 5.0, "floor_ms": 2.0}
    step["replayed"] = 0.97
    theirs = {"section": "transformers", "engine": "transformers, 16 bits", "graphs": None}
    theirs["replayed"] = None
    return [
        _row("decode", 1.0, "tokens/s", **{**step, "p50_ms": 99.0}),
        _row("decode", 16000.0, "tokens/s", **step),
        _row("decode", 9000.0, "tokens/s", **{**step, "graphs": "off", "p50_ms": 7.0}),
        _row("decode", 5000.0, "tokens/s", **{**step, **theirs, "p50_ms": 12.8, "floor_ms": None}),
        _row("distinct LoRA, to base", 0.4, "x", section="adapters", goal=">= 0.5", met=False),
        _row("start: test kernels", 1.5, "s", section="start", goal="< 2 s", met=True),
        {"absent": "no engine, x", **_row("bits", 0, "", section="bits")},
        _row("decode", 123456.0, "tokens/s", **step, rehearsal=True),
    ]


def test_the_tables_show_the_newest_figures_and_what_is_missing() -> None:
    rows = _results()
    rows[-2].pop("value")
    text = report.markdown(rows)
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    ours = ["deltaserve", "auto", "64", "97%", "512", "base", "16000.0", "4.0", "5.0", "2 (50%)"]
    assert ours in lines
    assert ["distinct LoRA, to base", "auto", "64", "-", "0.4 x", ">= 0.5", "**no**"] in lines
    assert ["start: test kernels", "auto", "64", "-", "1.5 s", "< 2 s", "yes"] in lines
    assert "- bits, graphs auto: no engine, x" in text
    more = [{**rows[1], "batch": n} for n in (256, 1)]
    decoding = [x for x in report.markdown([*rows, *more]).splitlines() if "| base |" in x]
    cells = [x.split("|")[3].strip() for x in decoding if x.startswith("| deltaserve | auto")]
    assert cells == ["1", "64", "256"]
    assert "99.0" not in text and "123456" not in text


def test_a_part_is_absent_no_more_once_it_was_measured() -> None:
    failed = {**_row("bits", 0, "", section="bits"), "absent": "failed", "engine": None}
    failed |= {"batch": None}
    failed.pop("value")
    made = _row("decode", 1.0, "tokens/s", section="bits", p50_ms=1.0)
    assert "- bits" in report.markdown([made, failed])
    assert "- bits" not in report.markdown([failed, made])


def test_a_steps_kernels_are_listed() -> None:
    kernels = {"gemm_kernel": 1.25, "norm_kernel": 0.5}
    row = _row("sum of own kernels", 1.75, "ms", kernels=kernels, launches=9, form="base")
    less = {**row, "batch": 1, "value": 1.0, "kernels": {"gemm_kernel": 1.0}}
    text = report.markdown([row, less])
    assert "| batch | of | launches | gemm | norm | sum |" in text
    assert "| 64 | base | 9 | 1.25 | 0.5 | 1.75 ms |" in text
    assert "| 1 | base | 9 | 1 | - | 1 ms |" in text


def test_the_plot_has_the_steps_of_the_base() -> None:
    rows = [row for row in _results() if "absent" not in row]
    drawn = report.plot(rows)
    assert drawn is not None
    ElementTree.fromstring(drawn)
    for expected in ("deltaserve, graphs", "launch by launch", "transformers", ">4.0<", ">12.8<"):
        assert expected in drawn
    assert "99.0" not in drawn


def test_without_rows_there_are_no_tables() -> None:
    assert report.markdown([]) == "" and report.plot([]) is None
    assert report.markdown([{**_results()[0], "rehearsal": True}]) == ""
