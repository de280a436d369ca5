"""Steps replayed from graphs of other steps are what they would be by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_double import RecordedCapture
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_oracle import random_primitive, relative_error
from torch import Tensor

from deltaserve.kernels.attention.gpu import paged_attention, write_cells
from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.captured import DecodeStep, Graphs, StepTensors
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.kernels.gpu.base import make_linear
from deltaserve.kernels.gpu.capture import NotCapturable
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.graph import StaticStep
from deltaserve.kernels.gpu.graphs import GraphTable, default_limits
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm import run_norm
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.norm_plans import NormPlans
from deltaserve.kernels.gpu.reserved import Family
from deltaserve.kernels.gpu.step import Limits, StepPlan
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.primitives import Bias, Primitive, Replace
from deltaserve.kernels.segments import Segments

LAYERS, HIDDEN, HEADS, KV, DIM, VOCABULARY = 2, 64, 2, 1, 32, 50
PARTS = ((HEADS * DIM, KV * DIM, KV * DIM), (HIDDEN,))
BLOCK, LENGTH, BLOCKS = 4, 24, 64
KINDS = {1: "low", 2: "bit", 3: "csr", 4: "rows", 5: "output", 6: "input", 7: "low", 8: "low"}
NORMS = {9: (0, 1, 2), 10: (1,), 11: (0, 2)}
"""Slots of adapters of norms, and which these tune; slot 10 adds biases too."""
BUCKETS = (1, 5)


class Model:
    """Two layers of attention, of which every linear takes adapters, and a norm before each and
    after the last. The linears after attention multiply in whole numbers."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.device = default_device()
        self.workspace = Workspace(self.device)
        self.arena = Arena(self.device, 1 << 18, grows=False)
        self.embedding = torch.randn(VOCABULARY, HIDDEN, device=self.device)
        ins = (HIDDEN, HEADS * DIM)
        self.bases, self.deltas = [], []
        for _ in range(LAYERS):
            for inner, outs in zip(ins, PARTS, strict=True):
                weight = torch.randn(sum(outs), inner) / inner**0.5
                self.bases.append(
                    make_linear(
                        weight,
                        None,
                        dtype=torch.float32,
                        quantize="int8",
                        activations="int8" if len(outs) == 1 else "float",
                    )
                )
                self.deltas.append(
                    GpuLinearDeltas(
                        inner, outs, torch.float32, arena=self.arena, workspace=self.workspace
                    )
                )
        for slot, kind in KINDS.items():
            made = []
            for deltas in self.deltas:
                group = deltas.group
                parts = {
                    p: (random_primitive(kind, out, group.in_features, 2 * slot),)
                    for p, out in enumerate(group.out_features)
                }
                if kind == "input":  # one for all parts: others would need their inputs apart
                    parts = dict.fromkeys(parts, parts[0])
                if kind == "low":  # of one structure in all layers
                    parts = {p: (replace(q, scale=0.5),) for p, (q,) in parts.items()}
                made.append(deltas.prepare(parts))
            if kind in ("csr", "rows"):  # likewise
                made[2:] = made[:2]
            for deltas, prepared in zip(self.deltas, made, strict=True):
                deltas.install(slot, prepared)
        self.plans = NormPlans(self.arena)
        self.norms = [
            GpuNormDeltas(HIDDEN, torch.float32, plans=self.plans, workspace=self.workspace)
            for _ in range(LAYERS + 1)
        ]
        for slot, which in NORMS.items():
            for i in which:
                own: tuple[Primitive, ...] = (Replace(torch.rand(HIDDEN)),)
                own += (Bias(torch.randn(HIDDEN)),) if slot == 10 else ()
                self.norms[i].install(slot, self.norms[i].prepare(own))
        self.gain = torch.ones(HIDDEN, device=self.device)
        cache = torch.randn(BLOCKS, LAYERS, 2, BLOCK, KV, DIM, device=self.device)
        self.cache = cache.movedim(0, 2)
        self.families = {
            name: Family(LayerPlans(self.deltas[i::2]), self.bases[i])
            for i, name in enumerate(("qkv", "o"))
        }

    def table(
        self,
        capture: RecordedCapture,
        limits: Limits | None = None,
        buckets: tuple = BUCKETS,
        **norms: Any,
    ) -> GraphTable:
        return GraphTable(
            self.forward,
            self.families,
            capture,
            limits=lambda *of: limits or replace(default_limits(*of), items=500),
            max_length=LENGTH,
            block_size=BLOCK,
            workspace=self.workspace,
            buckets=buckets,
            norms=self.plans,
            **{"captured": range(LAYERS + 1), **norms},
        )

    def forward(self, step: StaticStep) -> Tensor:
        x = self.embedding[step.ids] + 0.01 * step.positions[:, None]
        for layer in range(LAYERS):
            qkv = self._linear(2 * layer, "qkv", self._norm(layer, x, step), step)
            q, k, v = qkv.split(list(PARTS[0]), 1)
            keys, values = self.cache[layer]
            write_cells(keys, values, k.view(-1, KV, DIM), v.view(-1, KV, DIM), step.cells)
            query = q.reshape(-1, HEADS, DIM)
            y = paged_attention(query, keys, values, step.attention, DIM**-0.5)
            x = x + self._linear(2 * layer + 1, "o", y.view(-1, HEADS * DIM), step)
        return self._norm(LAYERS, x, step) @ self.embedding.T

    def _norm(self, i: int, x: Tensor, step: StaticStep) -> Tensor:
        tuned = None if step.norms is None else step.norms.of(i)
        return run_norm(x, self.gain, 1e-5, self.workspace, tuned=tuned).x

    def _linear(self, i: int, name: str, x: Tensor, step: StaticStep) -> Tensor:
        plan: StepPlan | None = step.plans[name][i // 2] if name in step.plans else None
        return self.deltas[i].run(x, self.bases[i], plan)

    def eager(self, step: DecodeStep) -> Tensor:
        """Without graphs: every table made for this step alone."""
        count = len(step.ids)
        lengths = [p + 1 for p in step.positions]
        tables = AttentionTables.allocate(count, LENGTH, BLOCK, 1, self.device)
        tables.fill([1] * count, lengths, step.blocks)
        cells = [
            b[p // BLOCK] * BLOCK + p % BLOCK
            for b, p in zip(step.blocks, step.positions, strict=True)
        ]
        plans = {name: f.layers.plan(step.segments, f.base) for name, f in self.families.items()}
        plans = {n: found for n, found in plans.items() if found[0] is not None}
        numbers = [torch.tensor(n, device=self.device) for n in (step.ids, step.positions, cells)]
        norms = self.plans.plan(step.segments) if self.plans.act(step.segments.slots) else None
        return self.forward(StaticStep(count, *numbers, tables, plans, norms))


def decode_step(mixes: list[tuple[tuple[int, float], ...]], positions: list[int]) -> DecodeStep:
    """Sequences in blocks of their own, in no order."""
    free = iter(torch.randperm(BLOCKS - 1).add(1).tolist())
    blocks = [[next(free) for _ in range(p // BLOCK + 1)] for p in positions]
    ids = torch.randint(0, VOCABULARY, (len(mixes),)).tolist()
    return DecodeStep(ids, positions, blocks, Segments.of(mixes))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def captured(model: Model) -> tuple[RecordedCapture, GraphTable]:
    patch = pytest.MonkeyPatch()
    capture = RecordedCapture(patch, model.workspace.poison)
    table = model.table(capture)
    seen: list[tuple[int, int, str]] = []
    table.capture(lambda *said: seen.append(said))
    kinds = [" with any adapters", " with plain adapters", ""]
    assert [what for _, _, what in seen][:3] == [f"5 tokens{kind}" for kind in kinds]
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    return capture, table


def check(model: Model, table: GraphTable, step: DecodeStep) -> Tensor | None:
    before = model.cache.clone()
    expected = model.eager(step)
    after = model.cache.clone()
    model.cache.copy_(before)
    found = table.run(step)
    if found is None:
        return None
    assert relative_error(found, expected) < 1e-5
    assert torch.allclose(model.cache, after, atol=1e-4)  # padding wrote nothing
    model.cache.copy_(before)
    return found.clone()


slot_mixes = st.one_of(
    st.just(()),
    st.sampled_from(sorted(KINDS | NORMS)).map(lambda s: ((s, 1.0),)),
    st.tuples(st.sampled_from([1, 2, 3, 9]), st.sampled_from([5, 6, 7, 10])).map(
        lambda pair: ((pair[0], 0.5), (pair[1], 1.5))
    ),
)
steps = st.lists(
    st.tuples(slot_mixes, st.integers(0, LENGTH - 1)), min_size=1, max_size=BUCKETS[-1]
)


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=steps)
def test_any_step_is_replayed(
    model: Model, captured: tuple[RecordedCapture, GraphTable], rows: list
) -> None:
    """More and fewer tokens, segments, adapters, pages and blocks than at capture, which had none;
    everything that a step has not written is NaN."""
    capture, table = captured
    mixes, positions = [list(column) for column in zip(*rows, strict=True)]
    replays = capture.replays
    assert check(model, table, decode_step(mixes, positions)) is not None
    assert capture.replays == replays + 1


def test_base_rows_are_the_same_with_and_without_adapters(
    model: Model, captured: tuple[RecordedCapture, GraphTable]
) -> None:
    _, table = captured
    step = decode_step([(), (), ((1, 1.0),), ((2, 1.0),)], [3, 9, 4, 23])
    mixed = check(model, table, step)
    alone = check(model, table, replace(step, segments=Segments((), 4)))
    assert mixed is not None and alone is not None
    assert torch.equal(mixed[:2], alone[:2]) and not torch.equal(mixed[2:], alone[2:])


def test_plain_adapters_have_a_graph_of_their_own(
    model: Model, captured: tuple[RecordedCapture, GraphTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low rank, whole rows and factors of outputs take no launch for inputs and tune no norm; the
    numbers are those of the graph for any adapters, which serves them where there is no other."""
    capture, table = captured
    mixes = [(), ((1, 0.5), (5, 1.5)), ((4, 1.0),), ((7, 1.0),)]
    step = decode_step(mixes, [3, 9, 4, 23])
    plain = check(model, table, step)
    products = ["aux_kernel", "gemm_kernel"]
    assert plain is not None
    assert [k for k in capture.launched if k in (*products, "inputs_kernel")] == 4 * products
    for slot in (2, 3, 6, 9, 10):  # also in one of the step's tokens alone
        other = replace(step, segments=Segments.of([*mixes[:3], ((slot, 1.0),)]))
        mixed = check(model, table, other)
        assert capture.launched.count("inputs_kernel") == 4
        assert capture.launched.count("norm_kernel") == 3
        assert mixed is not None and torch.equal(mixed[0], plain[0])
    assert torch.equal(check(model, table, step), plain)
    assert capture.launched.count("inputs_kernel") == 0
    monkeypatch.setattr(table._graphs[5, True], "plain", None)
    assert torch.equal(check(model, table, step), plain)
    assert capture.launched.count("inputs_kernel") == 4


def test_only_what_a_step_uses_is_sent(
    model: Model, captured: tuple[RecordedCapture, GraphTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one copy: the plans while the device has others, of the blocks as many for each sequence
    as the longest has; which are where the kernels look for them, after longer ones too."""
    _, table = captured
    graph = table._graphs[5, True].graph
    send, sent = graph._memory.send, []
    monkeypatch.setattr(graph._memory, "send", lambda *of: sent.append(of[1:]) or send(*of))
    step = decode_step([((1, 1.0),), ((4, 1.0),), ()], [3, 9, 4])
    others = [decode_step([()] * 3, positions) for positions in ([23, 2, 9], [1, 0, 2])]
    for own in (step, *(replace(other, segments=step.segments) for other in others)):
        assert check(model, table, own) is not None
    ends = [graph._table + 5 * width for width in (3, 6, 1)]
    assert sent == list(zip((0, graph._head, graph._head), ends, strict=True))


def test_what_is_installed_changes_between_two_replays(
    model: Model, captured: tuple[RecordedCapture, GraphTable]
) -> None:
    """An adapter that moves, and another one in its slot, after both sides knew the step."""
    _, table = captured
    step = decode_step([((7, 1.0),), ((8, 1.0),), ((9, 1.0),), ((10, 1.0),)], [5, 6, 7, 2])
    before, again = check(model, table, step), check(model, table, step)
    for deltas in model.deltas:
        deltas.remove(1)
    places = [norm._vectors[9].spot.place for norm in model.norms]
    starts = [place.offset for place in places]
    rest = model.arena.reserve(model.arena.units * 16 - model.arena.used)
    model.arena.bytes_of(rest).fill_(255)  # NaN where they were
    model.arena.drop(rest)
    assert all(place.offset != at for place, at in zip(places, starts, strict=True))
    after = check(model, table, step)
    assert before is not None and again is not None and after is not None
    assert torch.equal(before, again) and torch.equal(before, after)
    for deltas in model.deltas:
        deltas.install(7, deltas.slots[8])
    other = check(model, table, step)
    assert other is not None
    assert not torch.equal(other[0], after[0]) and torch.equal(other[1:], after[1:])
    for norm in model.norms:  # of all norms, where that of one was; and none of any
        norm.install(10, norm.prepare((Replace(torch.rand(HIDDEN)),)))
        norm.remove(9)
    last = check(model, table, step)
    assert last is not None and torch.equal(last[:2], other[:2])
    assert not any(torch.equal(last[i], other[i]) for i in (2, 3))
    base = check(model, table, replace(step, segments=Segments((), 4)))
    assert base is not None and torch.equal(last[2], base[2])


def test_steps_that_do_not_fit_are_for_the_caller(model: Model) -> None:
    patch = pytest.MonkeyPatch()
    capture = RecordedCapture(patch, model.workspace.poison)
    small = replace(default_limits(2, 128), width=16, pages=4)
    middle = model.norms[1]
    middle.install(12, middle.prepare((Replace(torch.rand(HIDDEN)),)))
    table = model.table(capture, small, (2,), vectors=lambda tokens: 1, captured=(0, 2))
    assert table.run(decode_step([()], [3])) is None  # nothing is captured yet
    table.capture()
    assert check(model, table, decode_step([(), ()], [3, 4])) is not None
    for step in (
        decode_step([(), (), ()], [3, 4, 5]),  # more tokens
        decode_step([()], [LENGTH]),  # longer
        decode_step([((7, 1.0),)], [3]),  # a greater rank than there is room for
        decode_step([((12, 1.0),)], [3]),  # a norm that was not captured
        decode_step([((11, 1.0),), ((11, 0.5),)], [3, 4]),  # more vectors of norms
        DecodeStep((), (), (), Segments((), 0)),
    ):
        assert table.run(step) is None
    for mix in ((5, 1.0),), ((11, 1.0),):
        assert check(model, table, decode_step([mix, ()], [3, 4])) is not None


def test_graphs_need_an_arena_that_stays() -> None:
    model = Model()
    model.arena.grows = True
    with pytest.raises(ValueError, match="must not grow"):
        model.table(RecordedCapture(pytest.MonkeyPatch(), lambda: None))


def test_a_step_that_asks_the_device_cannot_be_captured(model: Model) -> None:
    """The double refuses what a GPU would."""
    capture = RecordedCapture(pytest.MonkeyPatch(), model.workspace.poison)
    asks = (
        lambda: torch.tensor([1.0]),
        lambda: model.embedding[int(model.embedding[0, 0] > 0)],
    )
    for run in asks:
        with pytest.raises(NotCapturable, match="cannot be captured"):
            capture(run)


def test_a_model_that_asks_the_device_is_launched_kernel_by_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = TritonBackend()
    backend.capture = RecordedCapture(pytest.MonkeyPatch(), backend.workspace.poison)
    how = {"vocabulary": 3, "most": 2, "max_length": LENGTH, "block_size": BLOCK}

    def made(forward: Callable[[StepTensors], object]) -> Graphs | None:
        return backend.graphs(forward, **how, progress=lambda share, what: None)

    assert made(lambda step: step.logits.fill_(float(step.ids.sum()))) is None
    assert "kernel by kernel" in caplog.text and "cannot be captured" in caplog.text
    graphs = made(lambda step: step.logits.copy_(step.positions[:, None] + torch.arange(3)))
    assert graphs is not None
    found = graphs.run(DecodeStep((5,), (7,), ([1, 2],), Segments((), 1)))
    assert found is not None and found.logits.tolist() == [[7, 8, 9]]
    assert found.best.tolist() == [[2, 1]]
