"""Whether the GPU kernels are right, and how long they take beside other projects'.

    python benchmarks/gpu.py check [--quick] [--jobs 10]
    python benchmarks/gpu.py check --architectures [llama gpt2 ...] [--jobs 10]
    python benchmarks/gpu.py kernels [--part base lowrank ...] [--seconds 90] [--save]
    python benchmarks/gpu.py report [--svg FILE]

`check` compares every kernel with float64 at the sizes of Llama-3.1-8B, in mixed batches and in
graphs replayed with other batches than they were captured with; then the engine on the GPU with the
engine on the CPU, on the zoo's variants in one batch; with --architectures, on a small model of
every architecture (of tests/archs.py). It exits with 1 if any is wrong.

`kernels` prints microseconds by replay of a CUDA graph that rotates through copies of the weights,
more than four times the L2 together: the median of two rounds of twenty replays, and beside it the
floor, the larger of the task's bytes at the measured copy rate and its operations at the measured
rate of a large product. Every figure is compared with float64 before it is timed. Rows are appended
to benchmarks/results/gpu.jsonl (`--save`, or `--out FILE`) one by one. Other projects' kernels are
looked for in benchmarks/carried (gpu_kernels/peers/__init__.py says what goes there).

`report` prints the tables of the saved results and draws what LoRA adds to a layer.

Without a GPU `check` and `kernels` run on tiny sizes in Triton's interpreter, to show that the code
works; nothing is saved then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
try:
    import deltaserve.kernels  # noqa: F401
except ImportError:  # the package is not installed: use the folders beside this one
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root / part) for part in ("kernels", "adapters", "server", "proto")]

PARTS = ("ceilings", "base", "lowrank", "bit", "sparse", "mixed")
CARRIED = Path(__file__).parent / "carried"


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

    def run(unit: int) -> int:
        done = subprocess.run([*command, str(unit)], capture_output=True, text=True)
        print(done.stdout + done.stderr[-2000:], end="", flush=True)
        return done.returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = sum(status != 0 for status in pool.map(run, range(len(units))))
    print(f"{failed} of {len(units)} pieces had something wrong" if failed else "all right")
    return 1 if failed else 0


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
        for part in args.part:
            if part in cases.PARTS:
                case.warm(cases.PARTS[part](args.peers), args.shard, args.warm)
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

    rows = report.load(args.results)
    if not rows:
        print(f"no results in {args.results}", file=sys.stderr)
        return 0
    print(report.markdown(rows))
    drawn = report.plot(rows)
    if args.svg and drawn is not None:
        args.svg.write_text(drawn)
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
    three.add_argument("--svg", type=Path, help="where to write the plot")
    args = parser.parse_args()
    if args.command != "kernels":
        return check(args) if args.command == "check" else report(args)
    return kernels(args)


if __name__ == "__main__":
    sys.exit(main())
