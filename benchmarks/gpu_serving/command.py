"""`gpu.py engine`: which parts are run, on which engine, in which process, and for how long."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import case, ceilings, traces
from gpu_kernels.record import RESULTS, Recorder, line
from gpu_kernels.supervise import Place, give_up

from gpu_serving import PARTS
from gpu_serving.sizes import FULL, REHEARSAL, Sizes

LIMITS = {
    "start": 30, "base": 90, "adapters": 150, "floor": 90, "loads": 120, "bits": 150,
    "kinds": 120, "transformers": 150,
}  # fmt: skip
"""Seconds after which a part is given up."""
STILL = 120
"""Seconds without progress after which a start is: it may be long, and may not stand still."""
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
    """In the order in which they are run: all that needs a server on one engine, whose start takes
    minutes, then transformers, for which it must be gone. `floor` looks at launches, which a graph
    hides."""
    way = "auto" if "auto" in graphs else "off"
    ways = {"floor": "off", "transformers": "none"}
    found = [Step(p, ways.get(p, way)) for p in PARTS if p in parts]
    if "off" in graphs and "base" in parts:
        at = next((i for i, step in enumerate(found) if step.graphs == "none"), len(found))
        found.insert(at, Step("base", "off"))
    return list(dict.fromkeys(found))


def start_of(steps: Sequence[Step]) -> str:
    """How the engine of these steps is started; steps are launched one by one on any."""
    return "auto" if any(step.graphs == "auto" for step in steps) else "off"


def without(graphs: str, steps: Sequence[Step]) -> list[Step]:
    """What is left to do where no engine can be started with `graphs`: the same without graphs, or
    nothing."""
    if graphs == "off":
        return [step for step in steps if step.graphs == "none"]
    return list(dict.fromkeys(Step(s.part, "off") if s.graphs == graphs else s for s in steps))


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
        self._begun = args.place.with_name("begun")
        if self._begun.exists() and (step := self._begun.read_text()):
            self.absent(Step(*step.split(":")), "the process crashed; its output says where")

    def write(self, step: Step, row: dict[str, Any]) -> None:
        mark = {"rehearsal": True} if self.rehearsal else {}
        head = {"part": "engine", "section": step.part, "shape": self.sizes.shape.name}
        row = {**head, "graphs": step.graphs, **row, **mark}
        self._recorder.write(row)
        self.past.append(row)
        with self._kept.open("a") as f:
            f.write(json.dumps(row) + "\n")

    def begin(self, step: Step | None) -> None:
        """What a process after this one calls absent if this one does not come to say so itself;
        None: nothing."""
        self._begun.write_text("" if step is None else str(step))

    def absent(self, step: Step, why: str) -> None:
        self.begin(None)
        self.write(step, {"what": step.part, "absent": why[:400]})

    def verdicts(self) -> str:
        """The goals and what is absent, once more at the end, where they are found."""
        judged = [row for row in self.past if row.get("goal")]
        missed = sum(not row["met"] for row in judged)
        shown = judged + [row for row in self.past if "absent" in row]
        return "\n".join(
            [f"\n{len(judged)} goals looked at, {missed} not met; absent:", *map(line, shown)]
        )

    def left(self) -> float:
        return self.end - time.monotonic()

    def leave(self, steps: Sequence[Step]) -> None:
        """What a process after this one is to do."""
        Place(" ".join(map(str, steps)), len(steps), self.left()).write(self.place)


def work(args: argparse.Namespace) -> int:
    """One process of a run. Ends with RESTART when the next part needs the engine gone, or when the
    device no longer answers."""
    run, served, again = Run(args), None, False
    with ExitStack() as stack:
        for i, step in enumerate(run.steps):
            rest = run.steps[i + 1 :]
            if run.left() <= 0:
                left = ", ".join(map(str, run.steps[i:]))
                print(f"not begun for lack of time: {left}", flush=True)
                break
            if i and (step.graphs == "none" or served is None):
                run.leave(run.steps[i:])
                again = True
                break
            if step.graphs != "none" and served is None:
                graphs = start_of(run.steps[i:])
                run.leave(without(graphs, run.steps[i:]))
                run.begin(step)
                served = _serve(run, step, graphs, stack)
            run.leave(rest)
            run.begin(step)
            _measure(run, step, served)
            run.begin(None)
        else:
            run.leave(())
        closing = threading.Timer(CLOSE, give_up)
        closing.daemon = True
        closing.start()
    closing.cancel()
    if again:
        give_up()
    print(run.verdicts(), flush=True)
    return 0


def _serve(run: Run, step: Step, graphs: str, stack: ExitStack) -> Any:
    from gpu_serving.checkpoint import write
    from gpu_serving.serving import serving

    try:
        with _watch(run, step, STILL, "the start") as watch:
            base = write(run.folder / "base", run.sizes.shape, watch.moved)
            ceilings.copy_tb_per_s()  # takes memory that the server is about to
            case.usable()
            return stack.enter_context(
                serving(base, run.folder, run.sizes, graphs, run.device, watch.moved)
            )
    except Exception as error:
        traces.tell(error)
        run.absent(step, f"no engine, {type(error).__name__}: {error}")
        give_up()


def _measure(run: Run, step: Step, served: Any) -> None:
    from gpu_serving import parts, peer

    part: Callable[[parts.Stage], Iterator[dict[str, Any]]]
    part = peer.transformers if step.part == "transformers" else parts.PARTS[step.part]
    began = time.monotonic()
    with _watch(run, step, LIMITS[step.part], "the part"):
        try:
            with served.stepping(step.graphs) if served else nullcontext():
                stage = parts.Stage(run.sizes, served, run.folder, run.past)
                for row in part(stage):
                    run.write(step, row)
        except Exception as error:
            traces.tell(error)
            run.absent(step, f"failed, {type(error).__name__}: {error}")
    print(f"[{step}: {time.monotonic() - began:.0f} s]", flush=True)
    if not case.usable():
        run.absent(step, "the device does not answer any more")
        give_up()


class _watch:
    """Ends the process, which says why, if the block takes too long, or as long after `moved`."""

    def __init__(self, run: Run, step: Step, seconds: float, what: str) -> None:
        self._run, self._step, self._seconds, self._what = run, step, seconds, what
        self._timer: threading.Timer | None = None

    def moved(self) -> None:
        """The block came further: its time begins anew."""
        self.__exit__()
        limit = max(1.0, min(self._seconds, self._run.left()))
        self._timer = threading.Timer(limit, self._late, (limit,))
        self._timer.daemon = True
        self._timer.start()

    def _late(self, limit: float) -> None:
        self._run.absent(self._step, f"{self._what} was not done after {limit:.0f} s")
        faulthandler.dump_traceback()
        give_up()

    def __enter__(self) -> _watch:
        self.moved()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


def check(args: argparse.Namespace) -> None:
    """Ends the process if this cannot be run or saved."""
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("engine: no GPU; --rehearse shows with tiny sizes that everything runs")
    results = RESULTS.parent.resolve()
    if args.rehearse and (args.save or (args.out and results in args.out.resolve().parents)):
        sys.exit("engine --rehearse: its figures mean nothing and are not saved in results/")
