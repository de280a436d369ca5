"""Decoding steps that the server replays from graphs give what the engine on the CPU gives; those
that no graph can hold are launched as ever. While a step runs, the next one is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_architectures_served
import torch
from engine_pair import Pair, on_gpu, pair, prompt
from graph_double import RecordedCapture
from rig import load_base, request
from variants import COMMON, VARIANTS, make_base, open_base

from deltaserve.adapters.delta_file import write_delta
from deltaserve.kernels.gpu import decoding
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.primitives import GatedPrefix, Replace
from deltaserve.server.config import AdapterConfig, ConfigError, EngineConfig
from deltaserve.server.engine.build import base_of, make_engine
from deltaserve.server.engine.collector import Collector, generate
from deltaserve.server.engine.core import AdapterRef, Combination, Member, Rule, Speculation
from deltaserve.server.engine.plan import graph_bytes

NAMES = [
    "lora", "rslora", "bitdelta-published", "ia3", "lora-tokens", "lora-embedding", "lora-patterns",
]  # fmt: skip
NORMS = {"norms": lambda name: True, "one norm": lambda name: name.endswith("1.input_layernorm")}
"""Adapters of norms alone, by which of them."""
PREFIX = "gated-prefix"


def tune_norms(root: Path, name: str, wanted: Callable[[str], bool]) -> None:
    """An adapter that gives some norms other gains."""
    generator = torch.Generator().manual_seed(3)
    named = open_base(root / "base").named_modules()
    sizes = {n: len(m.weight) for n, m in named if n.endswith("norm") and wanted(n)}
    gains = {n: (Replace(torch.rand(size, generator=generator)),) for n, size in sizes.items()}
    write_delta(root / "adapters" / name, gains, kind=name)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoding")
    make_base(root / "base", "llama")
    (root / "adapters").mkdir()
    generator = torch.Generator().manual_seed(2)
    for name in NAMES:
        VARIANTS[name].make(root / "base", root / "adapters" / name, generator)
    for name, wanted in NORMS.items():
        tune_norms(root, name, wanted)
    config = open_base(root / "base").config
    shape = (3, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    keys, values = (
        tuple(torch.randn(shape, generator=generator) for _ in range(config.num_hidden_layers))
        for _ in range(2)
    )
    write_delta(root / "adapters" / PREFIX, {}, kind=PREFIX, prefix=GatedPrefix(keys, values))
    return root


@pytest.fixture(scope="module")
def gpu() -> Iterator[TritonBackend]:
    with on_gpu() as found:
        yield found


@pytest.fixture(scope="module")
def engines(gpu: TritonBackend, family: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(decoding, "BUCKETS", (1, 4))
        yield pair(
            stack, gpu, family, [*NAMES, *NORMS, PREFIX], captured=True, max_sequences=4,
            max_batch_tokens=32, max_length=96,
        )  # fmt: skip


class Watched:
    """What happens in an engine's steps, in order. replays: the numbers of their tokens."""

    def __init__(self, both: Pair, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.replays: list[int] = []
        runner = both.gpu._runner
        graphs: Any = runner._graphs
        run, backend = graphs.run, both.model.ctx.backend

        def replayed(step: Any) -> Any:
            found = run(step)
            if found is not None:
                self.replays.append(len(step.ids))
            self.events.append("eager" if found is None else "replay")
            return found

        def fetch(x: Any) -> Callable[[], Any]:
            wait = type(backend).fetch(backend, x)

            def waited() -> Any:
                self.events.append("wait")
                return wait()

            return waited

        def planned(plans: LayerPlans, *given: Any) -> None:
            self.events.append("plan")
            replan(plans, *given)

        replan = LayerPlans.replan
        patch.setattr(graphs, "run", replayed)
        patch.setattr(backend, "fetch", fetch)
        patch.setattr(LayerPlans, "replan", planned)


def test_the_next_step_is_laid_out_while_one_runs(
    engines: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is planned between the end of a step and the start of the next, also where a sequence
    is known to end; and nothing at all once both sides know the mix."""
    seen, outbox = Watched(engines, monkeypatch), Collector()
    asked = [
        request(prompt(30, 4), "rslora", max_tokens=7),
        request(prompt(31, 4), "lora", max_tokens=3),
    ]
    with engines.gpu._lock:  # both come at once
        for r in asked:
            engines.gpu.submit(r, outbox)
    assert [len(outbox.wait(r.request_id, 120).token_ids) for r in asked] == [7, 3]
    steps = "".join({"wait": "|", "replay": "r", "plan": "p"}[e] for e in seen.events).split("|")
    plans = "p" * 5  # q k v; o; gate up; down; the head
    # the prompts; three steps after which one side does not know the mix; the rest; after the last
    assert steps == [plans, *["r" + plans] * 3, *["r"] * 3, ""]
    assert seen.replays == [2, 2, 1, 1, 1, 1]


def test_any_mix_is_replayed(engines: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strengths, compositions, base rows, drafts, rows that the host chooses from."""
    seen = Watched(engines, monkeypatch)
    mixes = [
        [],
        [("lora", 1.0)],
        [("bitdelta-published", 0.7), ("lora", -0.5)],
        [("rslora", 0.5), ("ia3", 1.0)],
    ]
    asked = [
        {
            f"{mix}": request(prompt(i, 3 + 2 * i), mix, max_tokens=2 + i)
            for i, mix in enumerate(mixes)
        },
        {
            "sampled": request(prompt(10), "lora", temperature=0.9, seed=5, max_tokens=3),
            "drafts": replace(
                request(prompt(9, 3) * 3, "bitdelta-published", max_tokens=5),
                speculation=Speculation(2, 1, 3),
            ),
            "a combination": replace(
                request(prompt(15), max_tokens=3, logprobs=3),
                combination=Combination(
                    (Member(adapters=(AdapterRef("ia3"),)), Member(weight=0.5)), Rule.PRODUCT
                ),
            ),
        },
    ]
    for batch in asked:
        engines.same(batch)
    assert {1, 4} <= set(seen.replays) <= {1, 2, 3, 4} and "eager" not in seen.events


def test_plain_adapters_take_two_launches_less_in_every_layer(engines: Pair) -> None:
    """As many as a step without a graph: nine of the base, as sequences are split, four more with
    adapters, and two more where 1-bit deltas or scaled inputs have o's and down's inputs made."""
    capture: Any = engines.model.ctx.backend.capture
    if not isinstance(capture, RecordedCapture):
        pytest.skip("a real graph does not say what it launches")
    mixed = [("lora", 1.0), ("rslora", -0.5)]
    for mix, count in (([], 9), (mixed, 13), ("bitdelta-published", 15), ("ia3", 15)):
        engines.same({f"{mix}": request(prompt(50), mix, max_tokens=2)})
        first, second = (i for i, k in enumerate(capture.launched) if k == "rope_kernel")
        assert second - first == count, mix


def test_adapters_of_norms_are_replayed(
    engines: Pair, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all norms, of one, at a strength, beside others and the base; installed anew; by
    themselves, when nothing acts on a linear. They cost no launch."""
    seen = Watched(engines, monkeypatch)
    mixes: list[Any] = ["norms", [("norms", 0.5), ("lora", 1.0)], "one norm", ""]
    engines.same({f"{m}": request(prompt(60 + i), m, max_tokens=3) for i, m in enumerate(mixes)})
    assert seen.replays == [4, 4] and "eager" not in seen.events
    for engine in (engines.cpu, engines.gpu):
        engine.adapters.unload("norms").result(timeout=60)
        engine.adapters.load("norms", str(family / "adapters" / "norms")).result(timeout=60)
    alone = engines.same({"norms": request(prompt(64), "norms", max_tokens=4)})["norms"]
    base = engines.same({"base": request(prompt(64), max_tokens=1)})["base"]
    assert seen.replays[2:] == [1, 1, 1] and base.logprobs != alone.logprobs[:1]


def test_norms_of_heads_and_activations_in_8_bits(
    gpu: TritonBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounding before may move a number to the next whole one: most log-probabilities are the
    same, the others a little off."""
    monkeypatch.setitem(COMMON, "num_hidden_layers", 1)
    make_base(tmp_path / "base", "qwen3")
    tune_norms(tmp_path, "norms", NORMS["norms"])
    VARIANTS["lora"].make(
        tmp_path / "base", tmp_path / "adapters" / "lora", torch.Generator().manual_seed(3)
    )
    monkeypatch.setattr(decoding, "BUCKETS", (2,))
    asked = [
        request(prompt(70, 2), "norms", max_tokens=3),
        request(prompt(71, 2), [("norms", 0.5), ("lora", 1.0)], max_tokens=3),
    ]
    with ExitStack() as stack:
        both = pair(
            stack, gpu, tmp_path, ["norms", "lora"], "int8", captured=True, activations="int8",
            max_sequences=2, max_length=32,
        )  # fmt: skip
        seen = Watched(both, monkeypatch)
        want, got = (generate(engine, asked, timeout=120) for engine in (both.cpu, both.gpu))
    assert seen.replays == [2, 2]
    off = [
        abs(a.logprob - b.logprob)
        for right, found in zip(want, got, strict=True)
        for a, b in zip(right.logprobs, found.logprobs, strict=True)
    ]
    assert [right.token_ids for right in want] == [found.token_ids for found in got]
    assert sorted(off)[len(off) // 2] < 1e-4 and max(off) < 0.05


def test_adapters_of_the_embedding_are_replayed(
    engines: Pair, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of some tokens, and low rank; at a strength, beside others and the base; installed anew,
    which moves what lies behind."""
    seen = Watched(engines, monkeypatch)
    mixes: list[Any] = ["lora-tokens", [("lora-embedding", 0.5), ("lora-tokens", 1.0)], "lora", ""]
    # 3, 70 and 200 are trained
    asked = {
        f"{m}": request([3, *prompt(80 + i), 70], m, max_tokens=3) for i, m in enumerate(mixes)
    }
    engines.same(asked)
    for engine in (engines.cpu, engines.gpu):
        engine.adapters.unload("lora").result(timeout=60)
        engine.adapters.unload("lora-tokens").result(timeout=60)
        for name in ("lora-tokens", "lora"):
            engine.adapters.load(name, str(family / "adapters" / name)).result(timeout=60)
    engines.same(asked)
    assert seen.replays == [4, 4] * 2 and "eager" not in seen.events


def test_layers_of_other_ranks_are_replayed(engines: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks and scales, and a layer without any, beside layers that are alike."""
    seen = Watched(engines, monkeypatch)
    mixes: list[Any] = ["lora-patterns", [("lora-patterns", 0.5), ("bitdelta-published", 1.0)], ""]
    engines.same({f"{m}": request(prompt(90 + i), m, max_tokens=3) for i, m in enumerate(mixes)})
    assert seen.replays == [3, 3] and "eager" not in seen.events


def test_what_no_graph_holds_is_launched(engines: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to a prompt beside the sequence."""
    seen = Watched(engines, monkeypatch)
    engines.same({"prefix": request(prompt(20), PREFIX, max_tokens=2)})
    assert not seen.replays and set(seen.events) == {"wait"}
    engines.same({"base": request(prompt(22), max_tokens=2)})
    assert seen.replays == [1]


def test_modeling_code_is_replayed_as_well(
    gpu: TritonBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned positions, layer norms, linears of other forms; against transformers."""
    run, found = decoding.DecodeGraphs.run, []
    monkeypatch.setattr(decoding, "BUCKETS", (2,))
    monkeypatch.setattr(
        decoding.DecodeGraphs, "run", lambda self, step: found.append(run(self, step)) or found[-1]
    )
    backend = type(gpu)()
    backend.capture = backend.capture or RecordedCapture(monkeypatch, backend.workspace.poison)
    test_architectures_served.check("gpt2", tmp_path, (4, 5), 2, backend)
    assert found and None not in found


def test_the_memory_plan_has_room_for_graphs(engines: Pair) -> None:
    graphs: Any = engines.gpu._runner._graphs
    config = EngineConfig(max_sequences=4, block_size=8)
    bound = graph_bytes(base_of(engines.model), config, engines.model.ctx.backend)
    assert graphs.nbytes < bound < 4 * graphs.nbytes
    base = replace(base_of(engines.model), norms=0)
    plans = [found.graph.step.norms for found in graphs._table._graphs.values()]
    offsets = sum(t.nbytes for plan in plans if plan is not None for t in plan._offsets)
    assert bound - graph_bytes(base, config, engines.model.ctx.backend) >= offsets > 0
    eager = replace(config, enforce_eager=True)
    assert graph_bytes(base_of(engines.model), eager, engines.model.ctx.backend) == 0


def test_graphs_may_be_turned_off(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(family / "base")
    asked: list[int] = []
    monkeypatch.setattr(
        type(model.ctx.backend), "graphs", lambda self, forward, **of: asked.append(of["most"])
    )
    for config in (
        EngineConfig(kv_cache_bytes=1 << 20, max_sequences=6, speculate=3),
        EngineConfig(kv_cache_bytes=1 << 20, max_sequences=6, enforce_eager=True),
    ):
        make_engine(model, config, AdapterConfig())
    assert asked == [24]

    def full(self: Any, forward: Any, **of: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(model.ctx.backend), "graphs", full)
    with pytest.raises(ConfigError, match=r"^--memory \d+: .*--enforce-eager"):
        make_engine(model, EngineConfig(kv_cache_bytes=1 << 20), AdapterConfig())
