"""Correctness of every kernel at real sizes: base products, each family, mixed batches, graphs; and
of the whole engine on the zoo."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    LowRank,
    Primitive,
    Replace,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
)
from deltaserve.kernels.segments import Mix, Segments
from gpu_kernels import architectures, data, ours, shapes, traces
from gpu_kernels.data import DEVICE, ON_GPU, Adapter
from gpu_kernels.engines import FORMS, engines
from gpu_kernels.reference import relative_error, served
from gpu_kernels.shapes import Group

GROUPS = shapes.LLAMA_8B if ON_GPU else shapes.TINY
TOKENS = (1, 5, 16, 40, 64, 200, 256) if ON_GPU else (1, 5, 40)
MAKERS: dict[str, Callable[[Group, int], Primitive]] = {
    "LowRank r=8": lambda g, n: LowRank(_rand(8, g.in_features, g), _rand(n, 8, g), 0.5),
    "LowRank r=3": lambda g, n: LowRank(_rand(3, g.in_features, g), _rand(n, 3, g), 2.0),
    "LowRank r=64": lambda g, n: LowRank(_rand(64, g.in_features, g), _rand(n, 64, g)),
    "Bit": lambda g, n: _bit(g, n, 1),
    "Bit, two planes": lambda g, n: _bit(g, n, 2),
    "SparseCsr": lambda g, n: _csr(g, n),
    "SparseRows": lambda g, n: SparseRows(_some(n), _rand(len(_some(n)), g.in_features, g)),
    "SparseCols": lambda g, n: _columns(g, n),
    "SparseBlocks": lambda g, n: _blocks(g, n),
    "Scale": lambda g, n: Scale(_factors(g.in_features), _factors(n)),
    "Scale of outputs": lambda g, n: Scale(None, _factors(n)),
    "Bias": lambda g, n: Bias(torch.randn(n)),
    "Replace": lambda g, n: Replace(_rand(n, g.in_features, g)),
}

MIXED = ("LowRank r=8", "LowRank r=64", "LowRank r=3", "Bit", "SparseCsr", "SparseCols", "Bias")


def tolerance(dtype: torch.dtype) -> float:
    """One rounding of y and one of what is multiplied between, and some room: a wrong index or a
    missing piece is far above it."""
    return {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-4}[dtype]


class Report:
    """Counts what was wrong, a line for each check."""

    def __init__(self) -> None:
        self.wrong = self.checks = 0

    def line(self, what: str, error: float, dtype: torch.dtype) -> None:
        self._count(error < tolerance(dtype), f"{what:72} {error:.2e}")

    def fact(self, what: str, right: bool) -> None:
        self._count(right, f"{what:72}")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A check that raises is wrong, and the next one is made all the same."""
        try:
            yield
        except Exception as error:
            self._count(False, f"{what:72} {type(error).__name__}: {str(error)[:300]}")
            traces.tell(error)

    def _count(self, right: bool, text: str) -> None:
        self.checks += 1
        self.wrong += not right
        print(f"{text} {'ok' if right else 'WRONG'}", flush=True)


Unit = Callable[[Report], None]


def units(quick: bool, served: Sequence[str] | None = None) -> list[Unit]:
    """The checks, in pieces that can be made in processes of their own. served: instead, those
    of architectures; of all, if it is empty."""
    found: list[Unit] = []
    if served is not None:
        return [
            partial(architectures.architecture, name=n) for n in served or architectures.names()
        ]
    for form in FORMS if ON_GPU and not quick else FORMS[:1]:  # the longest first
        found.append(partial(engines, form=form, quick=not ON_GPU))
    first, second = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16, torch.float32)
    few = (5, 40) if quick else (16, 200) if ON_GPU else TOKENS
    many = (5, 40) if quick else TOKENS
    for group in GROUPS[:1] if quick else GROUPS:
        for dtype, tokens in ((first, many), (second, few)):
            found.append(partial(bases, group=group, dtype=dtype, tokens=tokens))
            found.append(partial(batches, group=group, form="int4", dtype=dtype, tokens=tokens))
        for form in () if quick else ("16-bit", "w8a8", "w4a8"):
            found.append(partial(batches, group=group, form=form, dtype=first, tokens=few))
        found.append(partial(families, group=group, dtype=first))
        for apart in (False, True):
            found.append(partial(graphs, group=group, dtype=first, apart=apart, quick=quick))
    return found


def title(unit: Unit) -> str:
    if not isinstance(unit, partial):
        return str(unit)
    given = (getattr(value, "name", None) or str(value) for value in unit.keywords.values())
    return " ".join([unit.func.__name__, *given])


def run(chosen: Sequence[Unit]) -> int:
    """Returns the exit code."""
    torch.manual_seed(time.time_ns() % (1 << 32))
    report, begin = Report(), time.monotonic()
    for unit in chosen:
        with report.attempt(title(unit)):
            unit(report)
            if ON_GPU:
                for cached in (ours.source, ours.linear, ours.held_weight):
                    cached.cache_clear()
                torch.cuda.empty_cache()
    print(f"{report.checks} checks, {report.wrong} wrong, {time.monotonic() - begin:.0f} s")
    return 1 if report.wrong else 0


def bases(report: Report, group: Group, dtype: torch.dtype, tokens: Sequence[int]) -> None:
    """The base product in every form."""
    for form in ours.FORMS:
        for count in tokens:
            what = f"{group.name} base {form} {_name(dtype)} M={count}"
            with report.attempt(what):
                linear = ours.linear(group, form, dtype)
                weight = ours.held_weight(group, form, dtype)
                x = torch.randn(count, group.in_features, device=DEVICE).to(dtype)
                expected = ours.read(form, x, dtype) @ weight.double().T
                error = relative_error(linear(x), expected)
                report.line(what, error, dtype)


def families(report: Report, group: Group, dtype: torch.dtype) -> None:
    """Each primitive alone: for one token, and for some of many."""
    runs = {1: (0, 1), 21 if ON_GPU else 6: (2, 5)}
    step = ours.Step(group, "int4", dtype, max(runs))
    for slot, (name, make) in enumerate(MAKERS.items(), 1):
        adapter = {part: (make(group, out),) for part, out in enumerate(group.parts)}
        for tokens, (start, end) in runs.items():
            what = f"{group.name} {name} M={tokens}"
            with report.attempt(what):
                step.install({slot: adapter})
                if slot in step.refused:
                    print(f"{what}: refused, {step.refused[slot]}", flush=True)
                    break
                segments = Segments([(start, end, ((slot, 0.75),))], tokens)
                _compare(report, what, step, {slot: adapter}, segments)
        step.layer.remove(slot)


def batches(
    report: Report, group: Group, form: str, dtype: torch.dtype, tokens: Sequence[int]
) -> None:
    """Batches that mix every family with compositions of two and tokens of the base, whose rows
    must be the base's own to the bit."""
    step = ours.Step(group, form, dtype, max(tokens))
    slots = _mixed_slots(group)
    step.install(slots)
    for count in tokens:
        segments = Segments.of(_mixes(slots, count))
        what = f"{group.name} mixed {form} {_name(dtype)} M={count}"
        with report.attempt(what):
            y = _compare(report, what, step, slots, segments)
            bare = [m for m in range(count) if not _covers(segments, m)]
            if bare:
                plain = step.base(step.x[:count])
                report.fact(f"{what}, rows of the base", torch.equal(y[bare], plain[bare]))


def graphs(report: Report, group: Group, dtype: torch.dtype, apart: bool, quick: bool) -> None:
    """A step captured with few adapters or many, replayed with more, with fewer and with none.
    apart: with adapters that scale the modules' inputs each its own way."""
    for tokens in (40,) if quick or not ON_GPU else (1, 16, 40, 200):
        step = ours.Step(group, "int4", dtype, tokens)
        slots = _mixed_slots(group, inputs=apart)
        step.install(slots)
        steps = {
            "many": Segments.of(_mixes(slots, tokens)),
            "last": Segments([(tokens - 1, tokens, ((len(slots), 0.5),))], tokens),
            "none": Segments((), tokens),
            "one": Segments([(0, tokens, ((1, 1.0),))], tokens),
        }
        for captured in ("many" if apart else "one",) if quick else ("one", "many"):
            title = f"{group.name} graph of {captured}{', inputs apart' if apart else ''}"
            with report.attempt(title):
                replay = step.captured(steps[captured], apart)
                for name, segments in steps.items():
                    step.x.copy_(torch.randn(step.x.shape, device=DEVICE))
                    y = replay(segments)
                    x = step.x[:tokens]
                    expected = served(group, x, step.weight, slots, segments, step.read)
                    what = f"{title}, replayed with {name} M={tokens}"
                    report.line(what, relative_error(y, expected), dtype)


def _compare(
    report: Report, what: str, step: ours.Step, slots: dict[int, Adapter], segments: Segments
) -> torch.Tensor:
    step.x.copy_(torch.randn(step.x.shape, device=DEVICE))
    y = step.once(segments)
    x = step.x[: segments.tokens]
    expected = served(step.group, x, step.weight, slots, segments, step.read)
    report.line(what, relative_error(y, expected), step.dtype)
    return y


def _mixed_slots(group: Group, inputs: bool = True) -> dict[int, Adapter]:
    """Adapters of one family each, of two in one module, and of one module alone. inputs: whether
    one scales the modules' inputs, each its own."""
    adapters: list[Adapter] = []
    for name in MIXED:
        make = MAKERS[name]
        adapters.append({part: (make(group, out),) for part, out in enumerate(group.parts)})
    out = group.parts[0]
    both = (MAKERS["LowRank r=8"](group, out), MAKERS["SparseCsr"](group, out))
    adapters.append({0: both})
    scale = MAKERS["Scale" if inputs else "Scale of outputs"]
    adapters.append({part: (scale(group, out),) for part, out in enumerate(group.parts)})
    return dict(enumerate(adapters, 1))


def _mixes(slots: Sequence[int] | dict[int, Adapter], tokens: int) -> list[Mix]:
    """Every slot, two compositions, and the base, in turn; equal ones beside each other."""
    known: list[Mix] = [(), *(((slot, 1.0),) for slot in slots)]
    known += [((2, 0.5), (4, -1.25)), ((5, 2.0), (1, 0.25), (7, 1.0))]
    order = sorted((5 * i + 1) % len(known) for i in range(tokens))
    return [known[i] for i in order]


def _covers(segments: Segments, token: int) -> bool:
    return any(start <= token < end for start, end, _ in segments.runs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rand(rows: int, columns: int, group: Group) -> torch.Tensor:
    return torch.randn(rows, columns) / math.sqrt(min(columns, group.in_features))


def _factors(count: int) -> torch.Tensor:
    return 0.5 + torch.rand(count)


def _some(count: int) -> torch.Tensor:
    return torch.arange(1, count, 37)


def _bit(group: Group, out: int, planes: int) -> Bit:
    signs = torch.randint(0, 256, (planes, out, group.in_features // 8), dtype=torch.uint8)
    return Bit(signs, torch.rand(planes, out) / group.in_features**0.5)


def _csr(group: Group, out: int) -> Primitive:
    found = data.sparse(Group("one", group.in_features, (out,)), 0.01)[0][0]
    assert isinstance(found, SparseCsr)
    return found


def _columns(group: Group, out: int) -> SparseCols:
    index = _some(group.in_features)
    return SparseCols(index, _rand(out, len(index), group))


def _blocks(group: Group, out: int) -> SparseBlocks:
    places = torch.arange(0, (out // 32) * (group.in_features // 32), 11)
    columns = group.in_features // 32
    index = torch.stack([places // columns, places % columns], 1)
    return SparseBlocks(index, torch.randn(len(index), 32, 32) / group.in_features**0.5)
