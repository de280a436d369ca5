"""The parts of `gpu.py engine` that need a server: rows of what each measures, one by one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from churn import quantile
from gpu_kernels.data import ON_GPU

from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.core import AdapterInfo
from gpu_serving import floors, serving
from gpu_serving.adapters import BITDELTA, KINDS, delta, lora
from gpu_serving.cold import first_token, flush, phase
from gpu_serving.serving import Serving
from gpu_serving.sizes import Sizes
from gpu_serving.streams import PATIENCE, Decoded, Names, decode, fill, request

Row = dict[str, Any]
SCORED = 16
"""Tokens of the answer that transformers is to score."""


@dataclass(frozen=True)
class Stage:
    """served: None in a part that needs no engine. folder: of files that are made once. past: rows
    of this run."""

    sizes: Sizes
    served: Serving | None
    folder: Path
    past: Sequence[Row]

    @property
    def serving(self) -> Serving:
        assert self.served is not None
        return self.served

    def row(self, what: str, value: float, unit: str, **more: Any) -> Row:
        """goal and met are None where the figure has none."""
        graphs = self.served.graphs if self.served else None
        head = {"what": what, "engine": "deltaserve", "graphs": graphs}
        return {**head, "value": value, "unit": unit, "goal": None, "met": None, **more}

    def decoded(
        self, names: Names, form: str, adapters: Iterable[AdapterInfo] = ()
    ) -> tuple[Row, Decoded]:
        """The row of sequences that decode together."""
        decoded = decode(self.serving.engine, self.sizes, names)
        floor = floors.bytes_ms(self.serving, decoded, len(names), adapters)
        return self.row(
            "decode",
            round(decoded.tokens_per_second, 1),
            "tokens/s",
            batch=len(names),
            context=decoded.context,
            form=form,
            max_length=self.sizes.max_length,
            replayed=decoded.replayed,
            p50_ms=round(decoded.ms(0.5), 4),
            p99_ms=round(decoded.ms(0.99), 4),
            floor_ms=round(floor, 4),
        ), decoded

    def ratio(self, what: str, value: float, goal: float | None, **more: Any) -> Row:
        """goal: at least, or at most if that is negative."""
        if goal is None:
            return self.row(what, round(value, 4), "x", **more)
        met = value >= goal if goal > 0 else value <= -goal
        sign = ">=" if goal > 0 else "<="
        return self.row(what, round(value, 4), "x", goal=f"{sign} {abs(goal):g}", met=met, **more)


def start(stage: Stage) -> Iterator[Row]:
    """How long the server took to start."""
    served = stage.serving
    for name, seconds in served.start.items():
        goal = {"goal": "< 2 s", "met": seconds < 2} if name == serving.TEST else {}
        yield stage.row(f"start: {name}", round(seconds, 3), "s", cached=served.compiled, **goal)
    total = sum(served.start.values())
    yield stage.row("start: all", round(total, 3), "s", cached=served.compiled)
    if ON_GPU and served.graphs == "auto" and not served.captured:
        why = "decoding steps were not captured, the log says why: all are launched one by one"
        yield {"what": "graphs", "absent": why}


def base(stage: Stage) -> Iterator[Row]:
    """The base alone, on a server without adapters; prompts too."""
    engine, sizes = stage.serving.engine, stage.sizes
    asked = request(sizes, 0, "", SCORED, logprobs=0)
    (answer,) = generate(engine, [asked], PATIENCE)
    ids, logprobs = list(answer.token_ids), [t.logprob for t in answer.logprobs]
    yield stage.row("answer", SCORED, "tokens", ids=ids, logprobs=logprobs)
    for batch in sizes.batches:
        yield stage.decoded([""] * batch, "base")[0]
    batch = sizes.many
    seconds = fill(engine, sizes, [""] * batch, first=max(sizes.batches))  # prompts of their own
    rate = round(batch * sizes.prompt / seconds, 1)
    yield stage.row("prompts", rate, "tokens/s", batch=batch, form="base")


def adapters(stage: Stage) -> Iterator[Row]:
    """The base beside adapters that nobody uses, then each of them in one batch."""
    sizes, alone = stage.sizes, dict[int, Decoded]()
    folders = loras(stage, sizes.resident)
    for batch in sizes.batches:
        row, alone[batch] = stage.decoded([""] * batch, "base, no adapters")
        yield row
    began = time.perf_counter()
    with stage.serving.loaded(folders) as infos:
        seconds = time.perf_counter() - began
        yield from sizes_of(stage, {"lora": next(iter(infos.values()))})
        yield stage.row(
            "loads", round(len(infos) / seconds, 2), "adapters/s", form="lora", batch=len(infos)
        )
        for batch in sizes.batches:
            row, beside = stage.decoded([""] * batch, f"base, {len(infos)} adapters resident")
            yield row
            of = alone[batch].ms(0.5) / beside.ms(0.5)
            yield stage.ratio("base beside adapters, to base", of, 0.98, batch=batch)
        for batch in (n for n in sizes.batches if n <= len(infos)):
            names = list(infos)[:batch]
            row, mixed = stage.decoded(names, "LoRA, all distinct", [infos[n] for n in names])
            yield row
            of = mixed.tokens_per_second / alone[batch].tokens_per_second
            goal = 0.5 if batch == sizes.many else None
            yield stage.ratio("distinct LoRA, to base", of, goal, batch=batch)
        if stage.serving.launches:  # here, as loading so many takes long
            with stage.serving.stepping("off"):
                yield from floor_of(stage, list(infos)[: sizes.many], "LoRA, all distinct")


def loads(stage: Stage) -> Iterator[Row]:
    """Times between tokens, quiet and while adapters that are in no cache are loaded; then the time
    from such files to a first token."""
    sizes, engine = stage.sizes, stage.serving.engine
    folders = loras(stage, 2 * sizes.streams)
    cold = [folder for _, folder in folders[sizes.streams :]]
    for folder in cold:
        flush(folder)
    gaps: dict[float, list[float]] = {0.0: [], 1.0: []}
    seconds: list[float] = []
    with stage.serving.loaded(folders[: sizes.streams]) as infos:
        fill(engine, sizes, list(infos))
        for rate in (0.0, 1.0) * sizes.phases:
            found, took = phase(stage.serving.engine, sizes, list(infos), cold, rate)
            gaps[rate] += found
            seconds += took
    quiet, loaded = (
        {"p50": 1e3 * quantile(gaps[rate], 0.5), "p99": 1e3 * quantile(gaps[rate], 0.99)}
        for rate in (0.0, 1.0)
    )
    for what, figures in (("quiet", quiet), ("one load a second", loaded)):
        for share, ms in figures.items():
            yield stage.row(
                f"between tokens, {what}, {share}", round(ms, 4), "ms", batch=sizes.streams
            )
    took = {"load_seconds": [round(s, 3) for s in seconds]}
    p99 = loaded["p99"] / quiet["p99"]
    yield stage.ratio("p99 while loading, to quiet", p99, -1.05, batch=sizes.streams, **took)
    firsts = [first_token(engine, sizes, f"first{i}", f) for i, f in enumerate(cold[: sizes.colds])]
    yield stage.row(
        "cold file to first token", round(quantile([t for t, _ in firsts], 0.5), 4), "s",
        form="lora", of_each=[round(t, 4) for t, _ in firsts],
        page_cache=sorted({state for _, state in firsts}),
    )  # fmt: skip


def kinds(stage: Stage) -> Iterator[Row]:
    """A batch with one sequence of every kind; and without the kind that tunes norms."""
    folders = [
        (kind.name, delta(stage.folder / "kinds" / kind.name, stage.sizes.shape, kind, i))
        for i, kind in enumerate(KINDS)
    ]
    row, alone = stage.decoded([""] * len(folders), "base, no adapters")
    yield row
    with stage.serving.loaded(folders) as infos:
        yield from sizes_of(stage, infos)
        for form, names in (
            ("one of each kind", list(infos)),
            ("one of each kind, none with norms", [n for n in infos if n != "ln-tuning"]),
        ):
            row, mixed = stage.decoded(names, form, [infos[n] for n in names])
            yield row
            of = mixed.tokens_per_second / alone.tokens_per_second * len(infos) / len(names)
            yield stage.ratio(f"{form}, to base", of, None, batch=len(names))


def bits(stage: Stage) -> Iterator[Row]:
    """1-bit deltas of whole models, all distinct."""
    count, shape = stage.sizes.bits, stage.sizes.shape
    folders = [
        (f"bit{i}", delta(stage.folder / "bits" / f"{i}", shape, BITDELTA, 100 + i))
        for i in range(count)
    ]
    row, alone = stage.decoded([""] * count, "base, no adapters")
    yield row
    with stage.serving.loaded(folders) as infos:
        row, mixed = stage.decoded(list(infos), "BitDelta, all distinct", infos.values())
        yield row
        of = mixed.tokens_per_second / alone.tokens_per_second
        yield stage.ratio("distinct BitDelta, to base", of, None, batch=count)


def floor(stage: Stage) -> Iterator[Row]:
    """The sum of the kernels of a step of the base, each timed apart; beside it the steps of this
    run."""
    for batch in stage.sizes.batches:
        yield from floor_of(stage, [""] * batch, "base")


def floor_of(stage: Stage, names: Names, form: str) -> Iterator[Row]:
    each, count = floors.kernels_ms(stage.serving, names)
    total, batch = sum(each.values()), len(names)
    about = {"batch": batch, "form": form}
    parts = {name: round(ms, 4) for name, ms in each.items()}
    yield stage.row(
        "sum of own kernels", round(total, 4), "ms", launches=count, kernels=parts, **about
    )
    for past in stage.past:
        if past["what"] == "decode" and {k: past.get(k) for k in about} == about:
            if "p50_ms" not in past or past["engine"] != "deltaserve":
                continue
            goal = -1.25 if past["graphs"] == "auto" else None  # launches alone are slower
            ratio = stage.ratio("step, to its kernels' sum", past["p50_ms"] / total, goal, **about)
            yield {**ratio, "graphs": past["graphs"]}


def sizes_of(stage: Stage, infos: dict[str, AdapterInfo]) -> Iterator[Row]:
    """What adapters take in memory, of what their files have."""
    for form, info in infos.items():
        share = round(info.resident_bytes / info.source_bytes, 4)
        yield stage.row(
            "resident bytes, to file", share, "x", form=form,
            resident_bytes=info.resident_bytes, file_bytes=info.source_bytes,
        )  # fmt: skip


def loras(stage: Stage, count: int) -> list[tuple[str, Path]]:
    """Names and folders; their numbers all differ, as equal ones would share memory."""
    shape, rank = stage.sizes.shape, stage.sizes.rank
    return [
        (f"lora{i}", lora(stage.folder / "lora" / f"{i}", shape, rank, 1000 + i))
        for i in range(count)
    ]


PARTS = {
    "start": start,
    "base": base,
    "adapters": adapters,
    "loads": loads,
    "kinds": kinds,
    "bits": bits,
    "floor": floor,
}
