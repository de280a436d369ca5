"""A figure to measure, and how a list of them is measured within a time."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NoReturn

import torch
from torch import Tensor

from gpu_kernels import ceilings, traces
from gpu_kernels.data import ON_GPU
from gpu_kernels.peers.work import AbsentError, Work
from gpu_kernels.record import Recorder
from gpu_kernels.reference import relative_error
from gpu_kernels.shapes import copies, floor_us
from gpu_kernels.timing import measure

MEMORY = 12 << 30 if ON_GPU else 64 << 20
"""All copies of one case together take no more than this."""
HUNG = 100
"""Seconds after which a case is given up: a kernel that waits for ever, or endless tuning."""
TOLERANCE = 2e-2
"""Relative error that 16-bit inputs, outputs and scales may add up to; a wrong index gives 1."""


@dataclass(frozen=True)
class Case:
    """engine: whose kernels. what: "base", "base+deltas" or "deltas".
    make(n): n calls on weights of their own. expected(): what one call gives, in float64.
    nbytes, operations: what the task cannot do without, for the floor. weights: those of the bytes
    that are weights, which come from memory; x and y have just been written by what ran before.
    where: the group, tokens and the like that name the case.
    """

    part: str
    engine: str
    what: str
    make: Callable[[int], Work]
    expected: Callable[[], Tensor]
    nbytes: int
    weights: int
    operations: int = 0
    where: dict[str, Any] = field(default_factory=dict)

    def row(self, **figures: Any) -> dict[str, Any]:
        head = {"part": self.part, "engine": self.engine, "what": self.what}
        return {**head, **self.where, **figures}


def run(
    cases: Iterable[Case],
    recorder: Recorder,
    seconds: float,
    begin: Callable[[int, float], object],
    give_up: Callable[[], NoReturn],
    first: int = 0,
) -> None:
    """Measures the cases in order until the time is used up; then says how many are left.

    first: the first case that is measured. begin(i, seconds): called before a case, with the number
    of the next one and the time that is left. give_up(): ends the process; it is called when a case
    has left the device unusable or has not come back after HUNG seconds.
    """
    end, left = time.monotonic() + seconds, 0
    for i, case in enumerate(cases):
        if i < first:
            continue
        if time.monotonic() > end:
            left += 1
            continue
        begin(i + 1, end - time.monotonic())

        def hung(case: Case = case) -> None:
            recorder.write(case.row(absent=f"not done after {HUNG} s"))
            faulthandler.dump_traceback()
            give_up()

        watch = threading.Timer(HUNG, hung)
        watch.daemon = True
        watch.start()
        recorder.write(run_one(case))
        watch.cancel()
        if not usable():
            give_up()
    if left:
        print(f"{left} more figures did not fit in {seconds:.0f} s", flush=True)


def usable() -> bool:
    """Whether the device still answers: after a bad access it does not, until the process ends."""
    if not ON_GPU:
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def run_one(case: Case) -> dict[str, Any]:
    """The row of one case. A peer that fails or gives a wrong answer is not timed."""
    try:
        work = case.make(copies_of(case))
        work.reset()
        off = relative_error(work.calls[0](), case.expected())
        if not off < TOLERANCE:
            return case.row(wrong=off)
        timing = measure(work.calls)
    except AbsentError as reason:
        return case.row(absent=str(reason))
    except Exception as error:  # a peer's own failure must not end the run
        traces.tell(error)
        return case.row(absent=f"failed, {type(error).__name__}: {str(error)[:300]}")
    limits = ceilings.copy_tb_per_s(), ceilings.matmul_tflop_per_s()
    floor = floor_us(case.nbytes, case.operations, *limits)
    return case.row(
        us=round(timing.us, 3),
        rounds=[round(r, 3) for r in timing.rounds],
        nodes=timing.nodes,
        copies=len(work.calls),
        mb=round(work.nbytes / 1e6, 3),
        error=float(f"{off:.2e}"),
        floor_us=round(floor, 3),
        fraction=round(floor / timing.us, 3),
    )


def copies_of(case: Case) -> int:
    if not ON_GPU:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(copies(case.weights, cache), MEMORY // max(case.weights, 1)))


def in_turn(parts: Iterable[Iterable[Case]]) -> Iterator[Case]:
    """One case of each part by turns: where time is short, the first of every part are warmed."""
    for row in zip_longest(*parts):
        yield from (case for case in row if case is not None)


def warm(cases: Iterable[Case], shard: int, shards: int) -> None:
    """Makes every shards-th case once, so that its kernels are in Triton's cache."""
    torch.set_num_threads(2)
    for i, case in enumerate(cases):
        if i % shards != shard:
            continue
        try:
            case.make(1).calls[0]()
        except Exception as error:
            print(f"warming {case.row()}: {error!r}"[:400], flush=True)
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
