"""benchmarks/gpu.py: its arithmetic, its tables, how it treats peers that fail; and the whole of
`check --quick` in Triton's interpreter."""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
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
from gpu_kernels import case, check, data, record, report, shapes, supervise  # noqa: E402
from gpu_kernels.check import Report  # noqa: E402
from gpu_kernels.engines import Asked, replayed  # noqa: E402
from gpu_kernels.peers import in_torch, quantized, vllm  # noqa: E402
from gpu_kernels.peers.work import AbsentError, Work  # noqa: E402
from gpu_kernels.reference import relative_error  # noqa: E402
from gpu_kernels.svg import Cluster, bars  # noqa: E402

from deltaserve.server import tune as server_tune  # noqa: E402

QKV, OUT, GATE_UP, DOWN = shapes.LLAMA_8B
TINY = shapes.TINY[0]


def test_check_in_the_interpreter_finds_every_kernel_right() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "check", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checks = [line for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert f"{len(checks)} checks, 0 wrong" in done.stdout
    for kind in (
        "base int4",
        "base fp8",
        "LowRank r=3",
        "Bit",
        "SparseCsr",
        "mixed",
        "graph of",
        "engine",
    ):
        assert any(kind in line for line in checks), kind


def test_what_a_check_has_no_time_for_is_counted_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "units", lambda *_: [None] * 3)
    args = argparse.Namespace(
        quick=True, architectures=None, unit=None, jobs=2, seconds=0.5
    )  # two pieces are begun, and importing torch alone takes them longer
    assert gpu.check(args) == 1
    said = capsys.readouterr().out
    assert said.count("[cut short]") == 2
    assert said.endswith("3 of 3 pieces were not done in 0.5 s\n") and "all right" not in said
    assert said.count("None: cut short") == 2 and said.count("None: not begun") == 1


def test_what_was_wrong_is_said_once_more() -> None:
    said = "a ok\nb 1e-1 WRONG\nc: refused, no layout\n3 checks, 1 wrong, 0 s\n"
    assert gpu._wrong("it", said, 1, False) == ["b 1e-1 WRONG", "c: refused, no layout"]
    assert gpu._wrong("it", "a ok\nKilled\n", -9, False) == ["it: ended with -9: Killed"]
    assert gpu._wrong("it", "a ok\n", -9, True) == ["it: cut short"]
    assert gpu._wrong("it", "a ok\n", 0, False) == []


def test_a_piece_that_raises_is_wrong_and_the_others_are_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raises(report: Report, form: str) -> None:
        raise ImportError("no module")

    def right(report: Report) -> None:
        report.fact("the other", True)

    assert check.run([partial(raises, form="int4"), right]) == 1
    said = capsys.readouterr().out
    assert "raises int4" in said and "ImportError: no module WRONG" in said
    assert "2 checks, 1 wrong" in said


def test_the_source_serves_processes_of_their_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that load adapters for a GPU start from nothing but the environment."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    gpu.use_source()
    program = "import deltaserve.kernels as k, sys; print(k.__path__[0], '/nowhere' in sys.path)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == [str(gpu.ROOT / "kernels/deltaserve/kernels"), "True"]


def test_what_is_measured_needs_nothing_that_the_doors_need() -> None:
    """A machine that is lent has torch, Triton and transformers, and not all that a server has."""
    needed = (
        "aiosqlite alembic fastapi google grpc grpc_health grpc_reflection grpc_status httptools"
    )
    needed += " llguidance prometheus_client pydantic rich scipy sqlalchemy typer uvicorn uvloop"
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
sys.modules.update(dict.fromkeys({needed.split()}))
import gpu, gpu_kernels.check, gpu_kernels.cases, gpu_kernels.report
import gpu_serving.command, gpu_serving.parts, gpu_serving.peer, gpu_serving.report
import deltaserve.server.engine.text, deltaserve.server.tune
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_wrong_figure_and_a_figure_that_is_not_finite_are_counted() -> None:
    found = Report()
    found.line("right", 1e-4, torch.float16)
    found.line("too far off", 2e-3, torch.float16)
    found.line("not finite", float("nan"), torch.float16)
    found.fact("not equal", False)
    assert (found.checks, found.wrong) == (4, 3)


def test_one_wrong_element_cannot_hide_in_a_large_result() -> None:
    expected = torch.randn(256, 4096).double()
    assert relative_error(expected, expected) == 0
    got = expected.clone()
    got[17, 5] += 1
    assert relative_error(got, expected) > 0.05
    got[17, 5] = float("nan")
    assert not relative_error(got, expected) < 1


def test_rows_without_a_delta_must_stay_zero() -> None:
    expected = torch.randn(4, 64).double()
    expected[2] = 0
    got = expected.clone()
    assert relative_error(got, expected) == 0
    got[2, 3] = 1
    assert relative_error(got, expected) > 0.05


def test_bytes_of_the_cost_model() -> None:
    layer = sum(g.weights for g in shapes.LLAMA_8B)
    assert layer == 218_103_808
    assert sum(shapes.base_bytes(g, "int4") for g in shapes.LLAMA_8B) == 115_867_648
    assert shapes.base_bytes(OUT, "16-bit") == 2 * 4096 * 4096
    assert shapes.base_bytes(OUT, "int8") == 4096 * 4096 + 4 * 4096
    assert sum(shapes.lowrank_bytes(g, [16]) for g in shapes.LLAMA_8B) == 2_621_440
    assert shapes.lowrank_bytes(QKV, [8, 16]) == 2 * 24 * (3 * 4096 + 6144)
    assert shapes.bit_bytes(OUT, 2) == 2 * (4096 * 512 + 4 * 4096)
    assert shapes.sparse_bytes(OUT, 1, 0.01) == round(0.04 * 4096 * 4096) + 4 * 4096
    assert shapes.activation_bytes(DOWN, 16) == 2 * 16 * (14336 + 4096)
    with pytest.raises(ValueError, match="int3"):
        shapes.base_bytes(OUT, "int3")


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert shapes.floor_us(4e6, 0, tb_per_s=4, tflop_per_s=800) == pytest.approx(1)
    assert shapes.floor_us(4e6, 8e9, tb_per_s=4, tflop_per_s=800) == pytest.approx(10)


def test_copies_are_more_than_four_caches_and_no_fewer_than_eight() -> None:
    cache = 60 << 20
    small = shapes.base_bytes(OUT, "int4")
    assert shapes.copies(small, cache) * small > 4 * cache
    assert shapes.copies(1 << 30, cache) == 8
    assert shapes.copies(1, cache) == 1024


def test_batches_keep_an_adapters_tokens_together() -> None:
    assert shapes.spread(5, 2) == (0, 0, 0, 1, 1)
    assert shapes.spread(3, 3, first=4) == (4, 5, 6)


@pytest.mark.parametrize("kind", ["cublas", "tinygemm", "baddbmm", "sparse", "dense"])
def test_peers_that_come_with_torch_are_right(kind: str) -> None:
    torch.manual_seed(0)
    batch = shapes.spread(6, 3)
    x = data.activations(6, TINY)
    adapters = {
        "baddbmm": lambda: data.low_rank(TINY, 8),
        "sparse": lambda: data.sparse(TINY, 0.05),
        "dense": lambda: data.one_bit(TINY),
    }
    if kind in adapters:
        problem = data.Problem(TINY, batch, x, tuple(adapters[kind]() for _ in range(3)))
        peer = {"baddbmm": in_torch.lora, "sparse": in_torch.sparse, "dense": in_torch.dense}[kind]
        work, expected = peer(problem, 2), problem.delta
    elif kind == "cublas":
        weight = data.weight(TINY)
        work, expected = in_torch.cublas(x, weight, 2), x.double() @ weight.double().T
    else:
        int4 = quantized.random_int4(TINY)
        work, expected = in_torch.tinygemm(x, int4, 2), x.double() @ int4.weight.T
    for call in work.calls:
        work.reset()
        assert relative_error(call(), expected) < case.TOLERANCE


def test_a_peer_that_is_not_carried_is_absent_with_the_reason(tmp_path: Path) -> None:
    problem = data.Problem(TINY, (0,), data.activations(1, TINY), (data.low_rank(TINY, 8),))
    with pytest.raises(AbsentError, match="vllm is not in"):
        vllm.lora(tmp_path, problem, 1)


def _case(make: Any, engine: str = "a peer") -> case.Case:
    expected = torch.ones(2, 3).double()
    where = {"group": "o", "tokens": 2, "adapters": 1, "form": "r8"}
    return case.Case("lowrank", engine, "deltas", make, lambda: expected, 64, 64, where=where)


def _work(value: float) -> Work:
    return Work([lambda: torch.full((2, 3), value)] * 2, lambda: None, 64)


def _begin(following: int, left: float) -> None:
    assert left > 0


def _give_up() -> Any:
    raise AssertionError("nothing here leaves the device unusable")


def test_rows_are_saved_one_by_one_and_failures_do_not_end_the_run(tmp_path: Path) -> None:
    def fails(copies: int) -> Work:
        raise RuntimeError("no kernel image")

    def absent(copies: int) -> Work:
        raise AbsentError("not carried")

    cases = [_case(fails), _case(absent), _case(lambda n: _work(2.0)), _case(lambda n: _work(1.0))]
    file = tmp_path / "results" / "gpu.jsonl"
    recorder = record.Recorder(file, commit="abc1234")
    seen: list[int] = []

    def counted() -> Any:
        for one in cases:
            seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
            yield one

    case.run(counted(), recorder, 60, _begin, _give_up)
    assert seen == [0, 1, 2, 3]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert "no kernel image" in rows[0]["absent"]
    assert rows[1]["absent"] == "not carried"
    assert rows[2]["wrong"] == pytest.approx(1)
    assert "us" not in rows[2]
    assert rows[3]["us"] > 0
    assert rows[3]["commit"] == "abc1234"
    assert {"gpu", "torch", "triton", "date", "floor_us", "fraction", "rounds"} <= rows[3].keys()


def test_what_does_not_fit_in_the_time_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    def slow(copies: int) -> Work:
        time.sleep(0.3)
        return _work(1.0)

    case.run([_case(slow)] * 4, record.Recorder(None), 0.2, _begin, _give_up)
    assert "3 more figures did not fit" in capsys.readouterr().out


class GaveUp(Exception):
    pass


def test_what_is_replayed_is_checked_in_a_batch_of_its_own() -> None:
    """One request whose steps are launched has all others of its batch launched too."""
    runner = argparse.Namespace(replays=5)
    asked = [Asked(name, [(name, 1.0)] if name else [], (1, 2)) for name in ("", "lora", "bits")]

    def generate(engine: Any, requests: Any, timeout: float) -> None:
        (request,) = requests
        runner.replays += 2 * all(ref.name != "bits" for ref in request.adapters)

    found = replayed(argparse.Namespace(_runner=runner), asked, generate)
    assert found == asked[:2]


def test_an_error_says_once_where_it_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    def raises_it() -> None:
        raise ValueError("of a kernel, told once")

    for _ in range(2):
        report = Report()
        with report.attempt("it"):
            raises_it()
        assert report.wrong == 1
    said = capsys.readouterr().err
    assert said.count("in raises_it") == 1 and said.count("ValueError: of a kernel") == 1


def test_the_first_cases_of_every_part_are_warmed_first() -> None:
    parts: Any = [["a", "b", "c"], ["d"], ["e", "f"]]
    assert list(case.in_turn(parts)) == ["a", "d", "e", "b", "f", "c"]


def test_tuning_asks_for_the_groups_of_the_benchmarks_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def tuned(specs: Any, buckets: Any, device: Any, progress: Any) -> Any:
        asked.extend((list(specs), buckets))
        return iter(())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(server_tune, "arch", lambda device: 90)
    monkeypatch.setattr(server_tune, "tune", tuned)
    assert gpu.tune(argparse.Namespace(tokens="64,16", out=tmp_path)) == 0
    specs, buckets = asked
    assert buckets == [16, 64]
    found = {(s.format, s.in_features, s.parts, s.group_size, s.activation) for s in specs}
    for group in shapes.LLAMA_8B:
        act = "silu" if group.name == "gate_up" else None
        assert ("int4", group.in_features, group.parts, shapes.QUANTIZED_GROUP, act) in found


def test_a_device_that_does_not_answer_is_left_to_a_new_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def give_up() -> Any:
        raise GaveUp

    begun: list[int] = []
    monkeypatch.setattr(case, "usable", lambda: False)
    with pytest.raises(GaveUp):
        case.run(
            [_case(lambda n: _work(1.0))] * 3,
            record.Recorder(None),
            60,
            lambda following, left: begun.append(following),
            give_up,
            first=1,
        )
    assert begun == [2]


def test_a_case_that_hangs_is_given_up_and_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given_up: list[bool] = []

    def hangs(copies: int) -> Work:
        time.sleep(0.5)
        return _work(1.0)

    monkeypatch.setattr(case, "HUNG", 0.1)
    recorder = record.Recorder(tmp_path / "gpu.jsonl")
    give_up: Any = lambda: given_up.append(True)  # noqa: E731
    case.run([_case(hangs)], recorder, 60, _begin, give_up)
    assert given_up == [True]
    row = json.loads((tmp_path / "gpu.jsonl").read_text().splitlines()[0])
    assert row["absent"] == "not done after 0.1 s"


WORKER = """
import os, sys
from pathlib import Path
from gpu_kernels import supervise

file = Path(sys.argv[-1])
place = supervise.Place.read(file)
first = place.first if place else 0
for i in range(first, 4):
    supervise.Place("bit", i + 1, 60.0 - i).write(file)
    print("case", i, flush=True)
    if i == 1:
        os.kill(os.getpid(), 9)
    if i == 2:
        supervise.give_up()
sys.exit(3)
"""


def test_a_worker_that_crashes_goes_on_with_the_next_case(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    assert supervise.run([sys.executable, "-c", WORKER]) == 3
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("case")] == [f"case {i}" for i in range(4)]


def test_a_worker_that_crashes_before_any_case_is_not_started_again() -> None:
    assert supervise.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -9


# The tables:


def _row(engine: str, what: str, group: str, **figures: Any) -> dict[str, Any]:
    machine = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "python": "3.12"}
    where = {"part": "lowrank", "group": group, "tokens": 16, "adapters": 16, "form": "r16"}
    head = {"commit": "abc1234", "date": "2026-11-22", "engine": engine, "what": what}
    return {**machine, **where, **head, "nodes": None, "floor_us": 1.0, **figures}


def _results() -> list[dict[str, Any]]:
    rows = []
    for group in report.LAYER:
        rows.append(_row("deltaserve", "base", group, us=99.0))
        rows.append(_row("deltaserve", "base", group, us=10.0, nodes=1.0))  # newer
        whole = {"us": 11.5, "nodes": 2.0, "floor_us": 1.25}
        rows.append(_row("deltaserve", "base+deltas", group, **whole))
        rows.append(_row("vLLM", "deltas", group, us=8.0, nodes=3.0))
        rows.append(_row("broken", "deltas", group, wrong=1.0))
        rows.append(_row("missing", "deltas", group, absent="not carried"))
        rows.append(_row("overlaps", "base", group, us=20.0))
        rows.append(_row("overlaps", "base+deltas", group, us=22.0))
    rows.append(_row("partial", "deltas", "qkv", us=1.0))
    return rows


def test_the_tables_sum_a_layer_and_name_what_is_missing() -> None:
    text = report.markdown(_results())
    row = next(line for line in text.splitlines() if line.startswith("| r16 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["r16", "16", "16"]
    assert cells[3:6] == ["40.0, 4 nodes", "6.0, 4 nodes", "32.0, 12 nodes"]
    assert cells[6:] == ["wrong", "absent", "8.0", "-"]
    assert "- missing (lowrank): not carried" in text
    assert text.count("not carried") == 1


def test_a_failure_of_ours_is_never_shown_as_a_figure() -> None:
    rows = [*_results(), _row("deltaserve", "base+deltas", "o", wrong=0.5)]
    results = report.Results(rows, "NVIDIA H200")
    assert report.added(results, "lowrank", "deltaserve", (16, 16, "r16")) == "wrong"


def test_the_plot_shows_what_was_measured_and_nothing_else() -> None:
    drawn = report.plot(_results())
    assert drawn is not None
    for expected in ("vLLM", "deltaserve", ">6.0<", ">32.0<", "16 tokens, 16 adapters"):
        assert expected in drawn
    assert "missing" not in drawn
    assert "partial" not in drawn


def test_bars_are_as_long_as_their_numbers() -> None:
    drawn = bars("a < b", "us", [Cluster("one", {"x": 10.0, "y": 5.0}, floor=2.5)])
    ElementTree.fromstring(drawn)
    assert "a &lt; b" in drawn
    assert 'width="520.0"' in drawn
    assert 'width="260.0"' in drawn
    assert 'x1="410.0"' in drawn


def test_a_long_legend_is_broken_into_lines_that_fit() -> None:
    names = [f"the engine with number {i} of all" for i in range(6)]
    drawn = bars("t", "us", [Cluster("c", {name: 1.0 + i for i, name in enumerate(names)})])
    places = {t.text: t.attrib for t in ElementTree.fromstring(drawn).iter() if t.text in names}
    assert len({place["y"] for place in places.values()}) > 1
    assert all(float(place["x"]) + 6.5 * 33 < 880 for place in places.values())


def test_without_results_nothing_is_written(tmp_path: Path) -> None:
    assert report.load(tmp_path) == []
    assert report.markdown([]) == ""
    assert report.plot([]) is None
