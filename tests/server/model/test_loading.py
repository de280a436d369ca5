"""What is loaded, what is refused and why, and how much memory loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import archs
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from deltaserve.adapters.base import ModuleKind
from deltaserve.server.model import MalformedModel, ModelNotFound, UnsupportedModel, load
from deltaserve.server.model.linear import LinearGroup
from deltaserve.server.model.spec import _Weights

Save = Callable[[PreTrainedModel], Path]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def save_small(tmp_path: Path, kind: str, **own: Any) -> Path:
    config = CONFIG_MAPPING[kind](**{**archs.COMMON, **own})
    config._attn_implementation = "eager"
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    return tmp_path / kind


def test_describes_the_model(saved: Save) -> None:
    folder = saved(archs.build("qwen2"))
    said: list[tuple[float, str]] = []
    model = load(
        folder, dtype=torch.float32, progress=lambda share, what: said.append((share, what))
    )
    assert [a.window for a in model.attention] == [None, None]
    assert (model.attention[1].q_heads, model.attention[1].kv_heads) == (4, 2)
    assert model.max_length == 512
    assert model.vocab_size == model.spec.vocab_size == 256
    assert model.eos_token_ids == (2,)
    q = model.spec.modules["model.layers.0.self_attn.q_proj"]
    assert (q.kind, q.in_features, q.out_features, q.has_bias) == (ModuleKind.LINEAR, 64, 64, True)
    reference = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.self_attn.k_proj", "model.embed_tokens", "model.norm"):
        assert torch.equal(model.spec.weight(name), reference[f"{name}.weight"])
    bias = model.spec.bias("model.layers.1.self_attn.k_proj")
    assert bias is not None
    assert torch.equal(bias, reference["model.layers.1.self_attn.k_proj.bias"])
    assert set(model.spec.tensor_digests) == set(reference)
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_gpt2_linears_are_told_in_checkpoint_layout(saved: Save) -> None:
    reference = archs.build("gpt2")
    model = load(saved(reference), dtype=torch.float32)
    spec = model.spec.modules["transformer.h.0.mlp.c_fc"]
    assert (spec.transposed, spec.in_features, spec.out_features) == (True, 64, 256)
    want = reference.get_submodule("transformer.h.0.mlp.c_fc").weight
    assert torch.equal(model.spec.weight("transformer.h.0.mlp.c_fc"), want)


def test_tied_weights_are_told(saved: Save) -> None:
    model = load(saved(archs.build("llama-tied-biased")), dtype=torch.float32)
    assert model.spec.tied == {"lm_head": "model.embed_tokens"}


def test_fingerprints_follow_the_weights(tmp_path: Path) -> None:
    prints = []
    for seed in (0, 0, 1):
        archs.build("llama", seed=seed).save_pretrained(tmp_path / f"{len(prints)}")
        spec = load(tmp_path / f"{len(prints)}", dtype=torch.float32).spec
        prints.append((spec.fingerprint, spec.held_fingerprint))
    quantized = load(tmp_path / "0", dtype=torch.float32, quantize="int8").spec
    assert prints[0] == prints[1]
    assert prints[0][0] != prints[2][0] and prints[0][1] != prints[2][1]
    assert quantized.fingerprint == prints[0][0] and quantized.held_fingerprint != prints[0][1]


def test_end_of_sequence_comes_from_the_generation_config(saved: Save) -> None:
    folder = saved(archs.build("llama"))
    generation = {"eos_token_id": [7, 9], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    model = load(folder, dtype=torch.float32)
    assert model.eos_token_ids == (7, 9)
    assert model.generation["temperature"] == 0.6


def test_routers_stay_dense(saved: Save) -> None:
    model = load(saved(archs.build("hunyuan-moe")), dtype=torch.float32, quantize="int4")
    kinds = {n: type(g.base).__name__ for n, g in model.modules.group_of.items()}
    assert {k for n, k in kinds.items() if n.endswith(".wg")} == {"DenseLinear"}
    assert {k for n, k in kinds.items() if n.endswith("_proj")} == {"Int4Linear"}
    assert kinds["lm_head"] == "Int8Linear"


def test_the_checkpoint_may_change_after_it_was_read(saved: Save) -> None:
    folder = saved(archs.build("mixtral"))
    model = load(folder, dtype=torch.float32)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-(file.seek(0, 2) // 2), 2)
        start = file.tell()
        file.write(b"\0" * ((folder / "model.safetensors").stat().st_size - start))
    state = model.model.state_dict()
    assert all(bool(t.abs().sum() > 0) for t in state.values())
    assert all(bool(model.spec.weight(n).abs().sum() > 0) for n in model.spec.modules)


def test_the_head_can_stay_dense(saved: Save) -> None:
    folder = saved(archs.build("llama"))
    model = load(folder, dtype=torch.float32, quantize="int8", quantize_head=False)
    assert type(model.modules.group_of["lm_head"].base).__name__ == "DenseLinear"


@pytest.mark.parametrize(
    ("kind", "own", "reason"),
    [
        ("diffllama", {}, "attention is called for layers"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "attention is called for layers"),
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "cannot be built"),
        ("falcon", {"new_decoder_architecture": True}, "cannot be built"),
        ("llama4_text", {**archs.MOE, "attention_chunk_size": 32}, "chunked_attention"),
        ("doge", {}, "mask of the model's own"),
    ],
)
def test_unsafe_architectures_are_refused_with_the_reason(
    kind: str, own: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_small(tmp_path, kind, **own)
    with pytest.raises(UnsupportedModel, match="not among the tested"):
        load(folder, dtype=torch.float32)
    with pytest.raises(UnsupportedModel, match=reason):
        load(folder, dtype=torch.float32, allow_untested=True)


def test_files_that_are_no_model(tmp_path: Path, saved: Save) -> None:
    with pytest.raises(ModelNotFound):
        load(tmp_path / "nowhere", dtype=torch.float32)
    folder = saved(archs.build("llama"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        load(folder, dtype=torch.float32)


def test_remote_code_is_never_run(saved: Save) -> None:
    folder = saved(archs.build("llama"))
    edit_config(
        folder,
        model_type="unheard_of",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModel):
        load(folder, dtype=torch.float32, allow_untested=True)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_missing_and_misshapen_tensors(quantize: Any, saved: Save) -> None:
    folder = saved(archs.build("llama"))
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(MalformedModel, match=r"layers\.1\.mlp\.up_proj"):
        load(folder, dtype=torch.float32, quantize=quantize)
    save_file({**tensors, name: torch.zeros(5, 64)}, path, {"format": "pt"})
    with pytest.raises(MalformedModel):
        load(folder, dtype=torch.float32, quantize=quantize)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(MalformedModel):
        load(folder, dtype=torch.float32, quantize=quantize)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"dtype": torch.float32, "quantize": "int3"},
        {"dtype": torch.float32, "quantize": "none", "activations": "int8"},
        {"dtype": torch.float32, "quantize": "int4", "group_size": 7},
    ],
)
def test_wrong_options(options: dict[str, Any], saved: Save) -> None:
    with pytest.raises(ValueError):
        load(saved(archs.build("llama")), **options)


PEAK = """
import sys, threading, time, torch
from transformers.utils import logging
from deltaserve.server.model import load
torch.set_num_threads(1)
logging.disable_progress_bar()
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1], dtype=torch.bfloat16, quantize="int4")
done = True
thread.join()
print(model.nbytes, peak - start, anonymous() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantizing_while_loading_keeps_memory_near_the_result(tmp_path: Path) -> None:
    own = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8192}
    config = CONFIG_MAPPING["llama"](**{**archs.COMMON, **own, "num_hidden_layers": 6})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {
        k: torch.empty(v.shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)
        for k, v in model.state_dict().items()
    }
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = (tmp_path / "model.safetensors").stat().st_size
    del tensors
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    held, peak, after = map(int, subprocess.check_output(command, text=True).split())
    assert source > 200 << 20
    assert held < 0.45 * source
    assert after < held + (24 << 20)
    # Quantizing a weight takes its float32 values and temporaries as large: how many of them
    # the watcher meets at once differs from run to run, so the bound is four of the largest.
    largest = own["vocab_size"] * own["hidden_size"] * 4
    assert peak < held + 4 * largest, "more than a few float weights were in memory at once"
    assert peak < source


def test_weights_are_read_beside_the_steps() -> None:
    """By the backend's way: a copy in the steps' own order would keep them waiting."""
    beside: list[torch.Tensor] = []
    backend = SimpleNamespace(to_host=lambda tensor: beside.append(tensor) or tensor)
    ctx: Any = SimpleNamespace(backend=backend)
    held = [torch.randn(2).bfloat16() for _ in range(4)]
    linear: Any = SimpleNamespace(in_features=3, dtype=torch.bfloat16, bias=held[3])
    norm = SimpleNamespace(weight=held[1], inner=SimpleNamespace(bias=held[2]))
    modules: Any = SimpleNamespace(
        embedding_name="embedding",
        embedding=SimpleNamespace(weight=held[0], ctx=ctx),
        norms={"norm": norm},
        group_of={"linear": LinearGroup(["linear"], linear, [2], ctx, by_token=False)},
    )
    weights = _Weights(modules, {})
    found = [weights.weight("embedding"), weights.weight("norm")]
    found += [b for name in ("norm", "linear") if (b := weights.bias(name)) is not None]
    for tensor, read, one in zip(held, beside, found, strict=True):
        assert torch.equal(read, tensor) and torch.equal(one, tensor.float())
