"""The engine on the Triton kernels gives what it gives on the CPU: every kind of adapter in one
batch, and whatever a request may ask for. Where there is no GPU, on a device whose memory is apart
from the host's (apart.py)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import archs
import packers
import pytest
import test_activated
import test_adaption_prompt
import test_architectures_served
import test_quantized_served
import torch
from engine_pair import Pair, on_gpu, pair, prompt
from rig import request
from safetensors.torch import save_file
from variants import VARIANTS, make_base, open_base

from deltaserve.adapters.delta_file import write_delta
from deltaserve.kernels.backend import DeviceUnavailable
from deltaserve.kernels.devices import open_backend
from deltaserve.kernels.gpu import linear, plan
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.kernels.gpu.staging import Landing
from deltaserve.kernels.primitives import Replace
from deltaserve.kernels.table import Group
from deltaserve.server.config import Config, ConfigError, ModelConfig
from deltaserve.server.engine.build import build_engine
from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.constraint import Constraint
from deltaserve.server.engine.core import (
    AdapterRef,
    Combination,
    Member,
    Rule,
    Speculation,
)
from deltaserve.server.engine.engine import ARRIVAL
from deltaserve.server.engine.matcher import Grammars
from deltaserve.server.engine.observer import NullObserver
from deltaserve.server.engine.text import Text
from deltaserve.server.model.fused_gpu import fused_layers

INVOCATION = test_activated.INVOCATION
LORAMOE = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "llama",
    "inference_mode": True,
    "r": 3,
    "lora_alpha": 12,
    "lora_nums": 4,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "target_modules": ["up_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def gpu() -> Iterator[TritonBackend]:
    with on_gpu() as found:
        yield found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an adapter of every kind."""
    root = tmp_path_factory.mktemp("gpu")
    make_base(root / "base", "llama")
    (root / "adapters").mkdir()
    generator = torch.Generator().manual_seed(1)
    for name, variant in VARIANTS.items():
        variant.make(root / "base", root / "adapters" / name, generator)
    test_activated.ACTIVATED.make(open_base(root / "base"), root / "adapters" / "activated", seed=0)
    prompts = test_adaption_prompt.CONFIGS["all"]()
    wrapped = test_adaption_prompt.get_peft_model(
        open_base(root / "base"), test_adaption_prompt.with_task(prompts)
    )
    test_adaption_prompt.randomize(wrapped, generator)
    wrapped.save_pretrained(str(root / "adapters" / "adaption-prompt"))
    return root


@pytest.fixture(scope="module")
def engines(gpu: TritonBackend, family: Path) -> Iterator[Pair]:
    names = sorted(p.name for p in (family / "adapters").iterdir() if p.is_dir())
    assert len(names) == len(VARIANTS) + 2
    with ExitStack() as stack:
        # Whatever an adapter has comes beside the steps, and nothing when it is published.
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(gpu.arena, "put", _refuse)
        yield pair(stack, gpu, family, names, max_batch_tokens=32)


def _refuse(blob: torch.Tensor) -> None:
    raise AssertionError(f"{blob.numel()} bytes are copied by the engine's thread")


def test_every_kind_in_one_batch(engines: Pair) -> None:
    """With weighted and combined ones, base rows between, and prompts in chunks. Every kind changes
    what the base says."""
    mixes: dict[str, list[tuple[str, float]]] = {"base": []}
    mixes |= {name: [(name, 1.0)] for name in VARIANTS}
    mixes |= {
        "at half": [("dora", 0.5)],
        "three": [("bitdelta", 0.6), ("lora-r11", -0.5), ("sparse", 1.2)],
        "halves": [("half-fine-tune", 0.3), ("lora-embedding", 0.7)],
    }
    asked = {
        what: request(prompt(i, 4 + i % 3), mix, max_tokens=3)
        for i, (what, mix) in enumerate(mixes.items())
    }
    asked["activated"] = request(
        [*prompt(40), *INVOCATION, *prompt(41, 3)], "activated", max_tokens=3
    )
    asked["adaption-prompt"] = request(prompt(42), "adaption-prompt", max_tokens=3)
    engines.same(asked)


def test_whatever_may_be_asked_for(engines: Pair, family: Path) -> None:
    long = prompt(7, 40)
    kept = {"max_tokens": 3}
    grammars = Grammars(Text(family / "base").backend, 260, [257])
    with_matchers = []
    for _ in range(2):
        (matcher,) = grammars.matchers(Constraint("regex", "[0-9]{2}x"), 1)
        with_matchers.append(replace(request(prompt(8), "lora", max_tokens=6), matcher=matcher))
    again = prompt(9, 3) * 4
    asked = {
        "a long prompt": request(long, "lora", **kept),
        "sampled": request(prompt(10), "dora", temperature=0.9, top_p=0.8, seed=5, **kept),
        "penalties": request(
            prompt(11), "ia3", repetition_penalty=1.5, presence_penalty=0.5,
            frequency_penalty=0.2, min_tokens=2, bad_tokens=((5,), (6, 7)),
            logit_bias=((9, 2.0),), **kept,
        ),
        "best of the vocabulary": request(prompt(12), "lora", logprobs=4, **kept),
        "a prompt scored": request(prompt(13, 12), "bitdelta", score_from=1, **kept),
        "drafts": replace(
            request(again, "lora", max_tokens=6), speculation=Speculation(4, 1, 3)
        ),
        "some modules": replace(
            request(prompt(14), **kept), adapters=(AdapterRef("dora", 1.0, ("*.q_proj",)),)
        ),
        "a combination": replace(
            request(prompt(15), **kept),
            combination=Combination(
                (
                    Member(adapters=(AdapterRef("lora"),)),
                    Member(adapters=(AdapterRef("sparse"),), weight=0.5),
                ),
                Rule.PRODUCT,
                disagreement=True,
            ),
        ),
    }  # fmt: skip
    try:
        found = engines.same(asked)
        assert found["drafts"].last.usage is not None
        assert len(found["a combination"].disagreements) == 3
        # a matcher follows one request
        want, got = (
            generate(engine, [asked], timeout=60)[0]
            for engine, asked in zip((engines.cpu, engines.gpu), with_matchers, strict=True)
        )
        assert got.token_ids == want.token_ids and got.text.endswith("x")
        cached = engines.same({"again": request(long, "lora", **kept)})["again"].last.usage
        assert cached is not None and cached.cached_tokens >= 32
    finally:
        grammars.close()


def test_adapters_come_and_go(engines: Pair, family: Path) -> None:
    """What is unloaded gives its memory back, and can be loaded again."""
    groups = engines.model.modules.groups.values()

    def held() -> int:
        return sum(group.deltas.nbytes for group in groups if group.deltas is not None)

    before = held()
    for engine in (engines.cpu, engines.gpu):
        engine.adapters.unload("rslora").result(timeout=60)
    assert held() < before
    for engine in (engines.cpu, engines.gpu):
        engine.adapters.load("rslora", str(family / "adapters" / "rslora")).result(timeout=60)
    assert held() == before
    engines.same({"rslora": request(prompt(20), "rslora", max_tokens=2)})


def test_what_is_on_its_way_is_not_awaited_awake(
    engines: Pair, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine thread rests between two looks at it, while nothing runs."""
    looks, rests = 0, list[float | None]()
    gpu, done = engines.gpu, Landing.done.fget
    assert done is not None
    wait = gpu._lock.wait

    def look(landing: Landing) -> Any:
        nonlocal looks
        looks += 1
        return looks > 20 and done(landing)

    def rest(seconds: float | None = None) -> bool:
        rests.append(seconds)
        return wait(seconds)

    gpu.adapters.unload("rslora").result(timeout=60)
    monkeypatch.setattr(Landing, "done", property(look))
    monkeypatch.setattr(gpu._lock, "wait", rest)
    gpu.adapters.load("rslora", str(family / "adapters" / "rslora")).result(timeout=60)
    assert looks > 20 and rests.count(ARRIVAL) >= 10


def test_a_spoilt_adapter_leaves_others_alone(engines: Pair, family: Path) -> None:
    """What it left in the cache is scrubbed."""
    linear = open_base(family / "base").get_submodule("model.layers.0.self_attn.v_proj").weight
    folder = family / "adapters" / "spoilt"
    write_delta(
        folder,
        {"model.layers.0.self_attn.v_proj": (Replace(torch.full_like(linear, 3e38)),)},
        kind="spoilt",
    )
    gpu = engines.gpu
    gpu.adapters.load("spoilt", str(folder)).result(timeout=60)
    with pytest.raises(Exception, match="not finite"):
        generate(gpu, [request(prompt(21, 20), "spoilt", max_tokens=2)], timeout=60)
    kv = engines.model.ctx.kv
    assert kv is not None
    there = gpu.stats().kv_blocks_there  # above them are adapters
    assert all(t[:there].cpu().isfinite().all() for t in (*kv.keys.values(), *kv.values.values()))
    gpu.adapters.unload("spoilt").result(timeout=60)
    engines.same({"after": request(prompt(22, 20), "lora", max_tokens=2)})


def test_a_step_is_planned_once_for_all_layers(
    engines: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever other adapters have left room for it; for another structure once more."""
    planned: list[Group] = []

    def build(group: Group, *rest: Any) -> Any:
        planned.append(group)
        return plan.build(group, *rest)

    monkeypatch.setattr(linear, "build", build)
    layers = Counter(
        g.deltas.group
        for g in engines.model.modules.groups.values()
        if g.deltas is not None and not g.logits
    )
    assert len(layers) == 4 and set(layers.values()) == {2}
    for name in ("lora", "lora-patterns", "half-fine-tune"):
        planned.clear()
        generate(engines.gpu, [request(prompt(23), name, max_tokens=1)], timeout=60)
        found = Counter(group for group in planned if group in layers)
        if name == "half-fine-tune":  # other modules of each layer
            assert layers.keys() == found.keys() and found.total() > len(layers)
        else:  # of both layers, and of one
            assert found == Counter(layers.keys())


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_base(gpu: TritonBackend, family: Path, quantize: str) -> None:
    names = ["lora", "bitdelta", "half-fine-tune"]
    with ExitStack() as stack:
        both = pair(stack, gpu, family, names, quantize)
        assert both.cpu.info().held_fingerprint == both.gpu.info().held_fingerprint
        both.same(
            {
                n or "base": request(prompt(i, 5), n, max_tokens=2)
                for i, n in enumerate(["", *names])
            }
        )


def test_activations_in_8_bits(gpu: TritonBackend, tmp_path: Path) -> None:
    """With adapters of several kinds in one batch, on weights of 4 bits and, in the head, of 8,
    with biases. A rounding before may move a number to the next whole one, so some tokens'
    log-probabilities are a little off, and those after them; most are the same."""
    make_base(tmp_path / "base", "qwen2")
    names = ["lora", "ia3", "bitdelta", "half-fine-tune"]
    for name in names:
        random = torch.Generator().manual_seed(3)
        VARIANTS[name].make(tmp_path / "base", tmp_path / "adapters" / name, random)
    mixes: list[Any] = [[], *names, [("lora", 0.5), ("ia3", 0.5)]]
    with ExitStack() as stack:
        both = pair(stack, gpu, tmp_path, names, "int4", activations="int8", max_batch_tokens=32)
        assert len(fused_layers(both.model.model)) == 2
        asked = [request(prompt(i), mix, max_tokens=2, score_from=1) for i, mix in enumerate(mixes)]
        want, got = (generate(engine, asked, timeout=120) for engine in (both.cpu, both.gpu))
        off = []
        for right, found in zip(want, got, strict=True):
            pairs = zip(right.prompt_logprobs, found.prompt_logprobs, strict=True)
            off += [abs(a.logprob - b.logprob) for a, b in pairs]
            if right.token_ids == found.token_ids:  # else two were nearly as good
                said = zip(right.logprobs, found.logprobs, strict=True)
                off += [abs(a.logprob - b.logprob) for a, b in said]
        assert len(off) > 0.8 * len(asked) * 7
        assert sorted(off)[int(0.8 * len(off))] < 1e-4 and max(off) < 0.2


@pytest.mark.parametrize("name", ["gptq-asymmetric-in-order", "bitsandbytes"])
def test_a_quantized_checkpoint(gpu: TritonBackend, tmp_path: Path, name: str) -> None:
    make_base(tmp_path / "float", "llama")
    pack, config = test_quantized_served.CHECKPOINTS[name]
    packers.write(tmp_path / "float", tmp_path / "base", tmp_path / "plain", pack, config)
    random = torch.Generator().manual_seed(0)
    VARIANTS["dora"].make(tmp_path / "plain", tmp_path / "adapters" / "dora", random)
    with ExitStack() as stack:
        both = pair(stack, gpu, tmp_path, ["dora"])
        both.same({n or "base": request(prompt(3, 5), n, max_tokens=2) for n in ("", "dora")})


KINDS = {
    "gpt2": "learned positions, transposed weights, layer norms with biases, tied embeddings",
    "gpt-oss": "experts, sinks, sliding windows, biases",
    "deepseek-v2": "latent attention, values narrower than keys, shared experts",
    "gemma2": "capped scores and logits, four norms a layer, gains beside 1",
    "cohere": "attention beside the MLP, scaled logits, rotation of neighbours",
    "gpt-bigcode": "one head of keys, one linear for all of attention",
    "phi3": "gate and up in one linear",
    "smollm3": "layers without positions",
}


@pytest.mark.parametrize("name", archs.ARCHS if torch.cuda.is_available() else KINDS)
def test_architectures(gpu: TritonBackend, name: str, tmp_path: Path) -> None:
    """Against transformers. Without a GPU, one of each form; benchmarks/gpu.py check
    --architectures has all of them."""
    test_architectures_served.check(name, tmp_path, (4, 5), 2, type(gpu)())


def test_experts_with_a_gate(engines: Pair, family: Path) -> None:
    """On one module of two, beside other adapters and mixed with one."""
    experts = family / "adapters" / "experts"
    experts.mkdir(exist_ok=True)
    (experts / "adapter_config.json").write_text(json.dumps(LORAMOE))
    stored = {}
    random = torch.Generator().manual_seed(5)
    for layer, module, out in ((0, "mlp.up_proj", 96), (1, "mlp.down_proj", 64)):
        inner = 160 - out
        prefix = f"base_model.model.model.layers.{layer}.{module}."
        stored[prefix + "lora_route.weight"] = torch.randn(4, inner, generator=random)
        for i in range(4):
            stored[f"{prefix}lora_A{i}.weight"] = torch.randn(3, inner, generator=random)
            stored[f"{prefix}lora_B{i}.weight"] = torch.randn(out, 3, generator=random) / 3
    save_file(stored, experts / "adapter_model.safetensors")
    for engine in (engines.cpu, engines.gpu):
        engine.adapters.load("experts", str(experts)).result(timeout=60)
    asked = {
        "base": request(prompt(50), max_tokens=3),
        "experts": request(prompt(50), "experts", max_tokens=3),
        "mixed": request(prompt(51), [("experts", 0.5), ("lora", 1.0)], max_tokens=3),
    }
    found = engines.same(asked)
    assert found["base"].logprobs[0].logprob != found["experts"].logprobs[0].logprob


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(family: Path) -> None:
    with pytest.raises(DeviceUnavailable, match=r"without CUDA|no CUDA device"):
        open_backend("cuda")
    config = Config(ModelConfig(family / "base", device="cuda"))
    with pytest.raises(ConfigError, match=r"^--device cuda: torch"):
        build_engine(config, NullObserver())
