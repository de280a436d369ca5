"""Whether the GPU kernels are right, how fast a server is on them, and how long they take beside
other projects'.

    python benchmarks/gpu.py check [--quick] [--jobs 10] [--seconds N]
    python benchmarks/gpu.py check --architectures [llama gpt2 ...] [--jobs 10]
    python benchmarks/gpu.py engine [--part base adapters ...] [--graphs auto off] [--save]
    python benchmarks/gpu.py engine --rehearse [cpu]
    python benchmarks/gpu.py kernels [--part base lowrank ...] [--seconds 90] [--save]
    python benchmarks/gpu.py tune [--tokens 16,64] [--out FOLDER]
    python benchmarks/gpu.py report [--svg FILE] [--svg-engine FILE]

Where a GPU is to be had for three times ten minutes, in this order:

    1   gpu.py check --jobs 12 --seconds 480, then gpu.py kernels --part ceilings --save
    2   gpu.py engine --seconds 570 --save
    3   gpu.py kernels --part base lowrank bit sparse mixed --warm 14 --warm-seconds 100
        --seconds 85 --save, and if time is left gpu.py tune

with --out FILE in place of --save where only some files are kept, and --commit HASH where there is
no git. Whatever ends one of them, rows and verdicts printed by then are kept: every figure is saved
as soon as it is known, a part that fails, hangs or crashes is said to be absent, and the others go
on in a new process.

`check` compares every kernel with float64 at the sizes of Llama-3.1-8B, in mixed batches and in
graphs replayed with other batches than they were captured with; then the engine on the GPU with the
engine on the CPU, on the zoo's variants in one batch; with --architectures, on a small model of
every architecture (of tests/archs.py). It exits with 1 if any is wrong, and says last what was.

`kernels` prints microseconds by replay of a CUDA graph that rotates through copies of the weights,
more than four times the L2 together: the median of two rounds of twenty replays, and beside it the
floor, the larger of the task's bytes at the measured copy rate and its operations at the measured
rate of a large product. Every figure is compared with float64 before it is timed. Rows are appended
to benchmarks/results/gpu.jsonl (`--save`, or `--out FILE`) one by one. Other projects' kernels are
looked for in benchmarks/carried (gpu_kernels/peers/__init__.py says what goes there).

`engine` serves a base of the shape of Llama-3.1-8B, random int4 weights in a checkpoint that is
made first (5 GB; with adapters 30 GB in --folder), through the server's own engine, requests
submitted as a server's. Parts, all on one engine but the last: how long it took to `start`; `base`,
decoding at batches of 64, 1, 16 and 256; `adapters`, the same with 64 LoRA in memory and in the
batch; `floor`, a step beside the sum of its own kernels, each timed apart; `loads`, times between
tokens while adapters are loaded from cold files; `bits`, 16 1-bit deltas; `kinds`, one sequence of
each kind; `base` with steps launched one by one; `transformers`, its own continuous batching on the
same weights in 16 bits, when the engine is gone. Prompts are of 448 tokens, figures from about 512
tokens of context. --graphs says whether steps are replayed from graphs (auto) or launched (off);
both by default, of which the second only makes `base`. Goals are judged and said again at the end.
The start compiles 282 kernels, some 150 to 200 seconds of one core, and unpacks the base, some 5 of
a layer: both estimates from a part of them on a machine without a GPU, and shared by all cores.

`tune` is `deltaserve tune` for the linears of that base; it needs no checkpoint, and nothing of a
server's dependencies.

`report` prints the tables of the saved results and draws what LoRA adds to a layer.

Without a GPU `check`, `kernels` and `engine --rehearse` run on tiny sizes in Triton's interpreter,
to show that the code works; nothing is saved then.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import gpu_serving
import torch

ROOT = Path(__file__).resolve().parents[1]


def use_source() -> None:
    """The folders beside this one, also for processes that are started from here: those that load
    adapters are programs of their own."""
    folders = [str(ROOT / part) for part in ("kernels", "adapters", "server", "proto")]
    sys.path[:0] = folders
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *([given] if given else [])])


faulthandler.enable()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is read is local; looking further may hang
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
try:
    import deltaserve.kernels  # noqa: F401
except ImportError:  # the package is not installed
    use_source()

PARTS = ("ceilings", "base", "lowrank", "bit", "sparse", "mixed")
CARRIED = Path(__file__).parent / "carried"
SHOWN = 60
"""Lines of what was wrong that are said once more at the end."""
MODELS = ROOT / "models"


def check(args: argparse.Namespace) -> int:
    from gpu_kernels import check

    units = check.units(args.quick, args.architectures)
    if args.unit is not None:
        return check.run(units[args.unit : args.unit + 1])
    if args.jobs == 1:
        return check.run(units)
    command = [sys.executable, __file__, "check", *(["--quick"] if args.quick else [])]
    if args.architectures is not None:
        command += ["--architectures", *args.architectures]
    command.append("--unit")

    end, known = time.monotonic() + args.seconds, os.environ.copy()
    known.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    found: list[str] = []

    def run(unit: int) -> int | None:
        left = end - time.monotonic()
        if left <= 0:
            found.append(f"{check.title(units[unit])}: not begun")
            return None
        piece = subprocess.Popen(
            [*command, str(unit)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=known,
        )  # fmt: skip
        stop = threading.Timer(left, piece.kill)
        stop.start()
        said = piece.communicate()[0]
        stop.cancel()
        cut = piece.returncode < 0 and time.monotonic() >= end
        print(said[-20000:], end="[cut short]\n" if cut else "", flush=True)
        found.extend(_wrong(check.title(units[unit]), said, piece.returncode, cut))
        return None if cut else piece.returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        statuses = list(pool.map(run, range(len(units))))
    failed, late = sum(bool(status) for status in statuses), statuses.count(None)
    if found:
        print("\n".join(["", "What was wrong, refused or not done:", *found[:SHOWN]]))
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more lines above")
    if failed or not late:
        print(f"{failed} of {len(units)} pieces had something wrong" if failed else "all right")
    if late:
        print(f"{late} of {len(units)} pieces were not done in {args.seconds:g} s")
    return 1 if failed or late else 0


def _wrong(title: str, said: str, status: int, cut: bool) -> list[str]:
    """The lines of a piece's output that say so, or that it ended without a word."""
    lines = [line for line in said.splitlines() if line.strip()]
    found = [line[:200] for line in lines if line.endswith(" WRONG") or ": refused, " in line]
    if cut:
        found.append(f"{title}: cut short")
    elif status and not found:
        found.append(f"{title}: ended with {status}: {(lines or [''])[-1][:200]}")
    return found


def engine(args: argparse.Namespace) -> int:
    """In processes of its own, one for each engine."""
    from gpu_kernels import supervise
    from gpu_serving import command

    command.check(args)
    if args.place is not None:
        return command.work(args)
    with ExitStack() as stack:
        folder = args.folder or MODELS / "gpu-engine"
        if args.rehearse and args.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return supervise.run([sys.executable, __file__, *sys.argv[1:], "--folder", str(folder)])


def kernels(args: argparse.Namespace) -> int:
    """Compiles if asked to, then measures in a process of its own."""
    if args.shard is not None or args.place is not None:
        return work(args)
    if args.warm:
        warm(args)
    from gpu_kernels import supervise

    return supervise.run([sys.executable, __file__, *sys.argv[1:]])


def work(args: argparse.Namespace) -> int:
    from gpu_kernels import case, cases, ceilings, record, supervise

    if args.shard is not None:
        parts = [cases.PARTS[part](args.peers) for part in args.part if part in cases.PARTS]
        case.warm(case.in_turn(parts), args.shard, args.warm)
        return 0
    file = args.out or (record.RESULTS if args.save else None)
    if file is not None and not torch.cuda.is_available():
        sys.exit("figures of the interpreter are not saved")
    recorder = record.Recorder(file, args.commit)
    print(recorder.machine, flush=True)
    place = supervise.Place.read(args.place)
    for part in args.part[args.part.index(place.part) if place else 0 :]:
        start = time.monotonic()
        first, seconds = (place.first, place.seconds) if place else (0, args.seconds)
        place = None
        if part == "ceilings":
            for row in ceilings.rows():
                recorder.write(row)
        else:

            def begin(following: int, left: float, part: str = part) -> None:
                supervise.Place(part, following, left).write(args.place)

            found = cases.PARTS[part](args.peers)
            case.run(found, recorder, seconds, begin, supervise.give_up, first)
        print(f"[{part}: {time.monotonic() - start:.0f} s]", flush=True)
    return 0


def report(args: argparse.Namespace) -> int:
    from gpu_kernels import report
    from gpu_serving import report as engine_report

    rows = report.load(args.results)
    if not rows:
        print(f"no results in {args.results}", file=sys.stderr)
        return 0
    served = [row for row in rows if row["part"] == "engine"]
    launched = [row for row in rows if row["part"] != "engine"]
    print(report.markdown(launched) + engine_report.markdown(served))
    drawn = report.plot(launched)
    if args.svg and drawn is not None:
        args.svg.write_text(drawn)
    drawn = engine_report.plot(served)
    if args.svg_engine and drawn is not None:
        args.svg_engine.write_text(drawn)
    return 0


def tune(args: argparse.Namespace) -> int:
    from gpu_serving import checkpoint, sizes

    from deltaserve.server.tune import TuneError, run

    with tempfile.TemporaryDirectory() as folder:
        shape = sizes.LLAMA_8B
        base = checkpoint.outline(Path(folder), shape)
        try:
            run(base, shape.dtype, "int4", shape.group, "float", args.tokens, args.out, False)
        except TuneError as error:
            sys.exit(f"tune: {error}")
    return 0


def warm(args: argparse.Namespace) -> None:
    """Compiles in that many processes first: each makes its share of the cases once."""
    begin = time.monotonic()
    command = [sys.executable, __file__, "kernels", "--peers", str(args.peers)]
    command += ["--part", *args.part, "--warm", str(args.warm), "--shard"]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(args.warm)]
    for worker in workers:
        try:
            worker.wait(max(1.0, begin + args.warm_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
    print(f"[compiled for {time.monotonic() - begin:.0f} s]", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check")
    one.add_argument("--quick", action="store_true", help="fewer sizes")
    one.add_argument("--architectures", nargs="*", metavar="NAME", help="these instead, or all")
    one.add_argument("--jobs", type=int, default=1, help="processes that compile and run at once")
    one.add_argument("--seconds", type=float, default=3600, help="for all pieces together")
    one.add_argument("--unit", type=int, help=argparse.SUPPRESS)
    two = commands.add_parser("kernels")
    two.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    two.add_argument("--seconds", type=float, default=90, help="for each part")
    two.add_argument("--save", action="store_true", help="append to benchmarks/results/gpu.jsonl")
    two.add_argument("--out", type=Path, help="append to this file instead")
    two.add_argument("--commit", help="of the source, where there is no git")
    two.add_argument(
        "--peers", type=Path, default=CARRIED, help="folder of other projects' kernels"
    )
    two.add_argument("--warm", type=int, default=0, help="processes that compile before the timing")
    two.add_argument("--warm-seconds", type=float, default=120)
    two.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    two.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    three = commands.add_parser("report")
    three.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    three.add_argument("--svg", type=Path, help="where to write the plot of kernels")
    three.add_argument("--svg-engine", type=Path, help="where to write the plot of steps")
    four = commands.add_parser("engine")
    four.add_argument("--part", nargs="+", choices=gpu_serving.PARTS, default=gpu_serving.PARTS)
    four.add_argument("--graphs", nargs="+", choices=("auto", "off"), default=["auto", "off"])
    four.add_argument("--seconds", type=float, default=3600, help="for all parts together")
    four.add_argument(
        "--rehearse", nargs="?", const="cuda", choices=("cuda", "cpu"),
        help="tiny sizes: on a GPU or in Triton's interpreter, or on the CPU's kernels",
    )  # fmt: skip
    four.add_argument("--save", action="store_true", help="append to benchmarks/results/gpu.jsonl")
    four.add_argument("--out", type=Path, help="append to this file instead")
    four.add_argument("--commit", help="of the source, where there is no git")
    four.add_argument("--folder", type=Path, help="of the model and adapters, made once")
    four.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    five = commands.add_parser("tune")
    five.add_argument("--tokens", default="16,64", help="numbers of tokens in a step, or all")
    five.add_argument("--out", type=Path, help="folder of the table; the user's cache if left out")
    args = parser.parse_args()
    run = {"check": check, "kernels": kernels, "engine": engine, "report": report, "tune": tune}
    return run[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
