"""`gpu.py engine`: which parts are run, on which engine, in which process, and for how long."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import case, ceilings
from gpu_kernels.record import RESULTS, Recorder
from gpu_kernels.supervise import Place, give_up

from gpu_serving import PARTS
from gpu_serving.sizes import FULL, REHEARSAL, Sizes

TWICE = ("start", "base")
"""Made with graphs and without."""
LAST = ("kinds", "bits")
"""They take adapters of gigabytes: made if time is left."""
LIMITS = {
    "start": 30, "base": 90, "adapters": 150, "loads": 120, "kinds": 120, "bits": 120,
    "transformers": 150, "floor": 90,
}  # fmt: skip
"""Seconds after which a part is given up."""
BUILD = 450
"""Seconds after which a start is."""
CLOSE = 30
"""Seconds that an engine has to close."""


@dataclass(frozen=True)
class Step:
    """One part. graphs: "auto", "off", or "none" for a part without an engine."""

    part: str
    graphs: str

    def __str__(self) -> str:
        return f"{self.part}:{self.graphs}"


def steps_of(parts: Sequence[str], graphs: Sequence[str]) -> list[Step]:
    """In the order in which they are run: one engine after the other. `floor` looks at launches,
    which a graph hides."""
    way = "auto" if "auto" in graphs else "off"
    chosen = [p for p in PARTS if p in parts]
    last = [Step(p, way) for p in chosen if p in LAST]
    found = [Step(p, way) for p in chosen if p not in (*LAST, "transformers", "floor")]
    found += [Step(p, "none") for p in chosen if p == "transformers"]
    if "off" in graphs:
        found += [Step(p, "off") for p in chosen if p in TWICE]
    found += [Step(p, "off") for p in chosen if p == "floor"]
    return list(dict.fromkeys(found + last))


def without(graphs: str, steps: Sequence[Step]) -> list[Step]:
    """What is left to do where no engine with `graphs` can be made: the same without graphs, or
    nothing."""
    kept = (s if s.graphs != graphs else Step(s.part, "off") for s in steps)
    return [s for s in dict.fromkeys(kept) if graphs != "off" or s.graphs != "off"]


class Run:
    """The rows and the place of a run that may be spread over several processes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.sizes: Sizes = REHEARSAL if args.rehearse else FULL
        self.device = args.rehearse or "cuda"
        self.rehearsal = bool(args.rehearse)
        self.folder: Path = args.folder
        self.place: Path = args.place
        self._recorder = Recorder(args.out or (RESULTS if args.save else None), args.commit)
        self._kept = args.place.with_name("rows.jsonl")
        self.past: list[dict[str, Any]] = []
        if self._kept.exists():
            self.past = [json.loads(line) for line in self._kept.read_text().splitlines()]
        place = Place.read(args.place)
        self.steps = steps_of(args.part, args.graphs)
        left = args.seconds
        if place is not None:
            self.steps = [Step(*text.split(":")) for text in place.part.split()]
            left = place.seconds
        else:
            print(self._recorder.machine, flush=True)
        self.end = time.monotonic() + left

    def write(self, step: Step, row: dict[str, Any]) -> None:
        mark = {"rehearsal": True} if self.rehearsal else {}
        head = {"part": "engine", "section": step.part, "shape": self.sizes.shape.name}
        row = {**head, "graphs": step.graphs, **row, **mark}
        self._recorder.write(row)
        self.past.append(row)
        with self._kept.open("a") as f:
            f.write(json.dumps(row) + "\n")

    def absent(self, step: Step, why: str) -> None:
        self.write(step, {"what": step.part, "absent": why[:400]})

    def left(self) -> float:
        return self.end - time.monotonic()

    def leave(self, steps: Sequence[Step]) -> None:
        """What a process after this one is to do."""
        Place(" ".join(map(str, steps)), len(steps), self.left()).write(self.place)


def work(args: argparse.Namespace) -> int:
    """One process of a run. Ends with RESTART when the next part needs another engine, or when the
    device no longer answers."""
    run, served, again = Run(args), None, False
    with ExitStack() as stack:
        for i, step in enumerate(run.steps):
            rest = run.steps[i + 1 :]
            if run.left() <= 0:
                left = ", ".join(map(str, run.steps[i:]))
                print(f"not begun for lack of time: {left}", flush=True)
                break
            if i and (step.graphs == "none" or served is None or served.graphs != step.graphs):
                run.leave(run.steps[i:])
                again = True
                break
            if step.graphs != "none":
                run.leave(without(step.graphs, run.steps[i:]))
                served = served or _serve(run, step, stack)
            run.leave(rest)
            _measure(run, step, served)
        else:
            run.leave(())
        closing = threading.Timer(CLOSE, give_up)
        closing.daemon = True
        closing.start()
    closing.cancel()
    if again:
        give_up()
    return 0


def _serve(run: Run, step: Step, stack: ExitStack) -> Any:
    from gpu_serving.checkpoint import write
    from gpu_serving.serving import serving

    try:
        with _watch(run, step, BUILD, "the start"):
            base = write(run.folder / "base", run.sizes.shape)
            ceilings.copy_tb_per_s()  # takes memory that the server is about to
            case.usable()
            return stack.enter_context(
                serving(base, run.folder, run.sizes, step.graphs, run.device)
            )
    except Exception as error:
        run.absent(step, f"no engine, {type(error).__name__}: {error}")
        give_up()


def _measure(run: Run, step: Step, served: Any) -> None:
    from gpu_serving import parts, peer

    stage = parts.Stage(run.sizes, served, run.folder, run.past)
    part: Callable[[parts.Stage], Iterator[dict[str, Any]]]
    part = peer.transformers if step.part == "transformers" else parts.PARTS[step.part]
    began = time.monotonic()
    with _watch(run, step, LIMITS[step.part], "the part"):
        try:
            for row in part(stage):
                run.write(step, row)
        except Exception as error:
            run.absent(step, f"failed, {type(error).__name__}: {error}")
    print(f"[{step}: {time.monotonic() - began:.0f} s]", flush=True)
    if not case.usable():
        give_up()


class _watch:
    """Ends the process, which says why, if the block takes too long."""

    def __init__(self, run: Run, step: Step, seconds: float, what: str) -> None:
        limit = max(1.0, min(seconds, run.left()))

        def late() -> None:
            run.absent(step, f"{what} was not done after {limit:.0f} s")
            give_up()

        self._timer = threading.Timer(limit, late)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def check(args: argparse.Namespace) -> None:
    """Ends the process if this cannot be run or saved."""
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("engine: no GPU; --rehearse shows with tiny sizes that everything runs")
    results = RESULTS.parent.resolve()
    if args.rehearse and (args.save or (args.out and results in args.out.resolve().parents)):
        sys.exit("engine --rehearse: its figures mean nothing and are not saved in results/")
