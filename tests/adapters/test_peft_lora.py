"""PEFT LoRA in every variant that is served, against PEFT itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.load import load
from deltaserve.kernels.primitives import Bias, LowRank, Replace, ReplaceRows, Scale

from . import tiny

ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (tiny.llama, dict(r=3, target_modules=ATTENTION)),
    "every-linear": (tiny.llama, dict(r=2, target_modules="all-linear")),
    "regex": (tiny.llama, dict(r=2, target_modules=r".*\.[02]\.mlp\.(up|down)_proj")),
    "excluded": (
        tiny.llama,
        dict(r=2, target_modules=ATTENTION, exclude_modules=["1.self_attn.q_proj"]),
    ),
    "rslora": (tiny.llama, dict(r=5, lora_alpha=3, use_rslora=True, target_modules=ATTENTION)),
    "patterns": (
        tiny.llama,
        dict(
            r=4,
            target_modules=[*ATTENTION, "o_proj"],
            rank_pattern={"q_proj": 7, r"layers\.1\.self_attn\.o_proj": 1, "^o_proj": 2},
            alpha_pattern={"self_attn.v_proj": 32, "2.self_attn.q_proj": 0.5},
        ),
    ),
    "layers": (
        tiny.llama,
        dict(r=2, target_modules=ATTENTION, layers_to_transform=[0, 2], layers_pattern="layers"),
    ),
    "one-layer": (tiny.llama, dict(r=2, target_modules=ATTENTION, layers_to_transform=1)),
    "lora-bias": (tiny.qwen2, dict(r=2, lora_alpha=5, target_modules=ATTENTION, lora_bias=True)),
    "bias-all": (tiny.qwen2, dict(r=2, target_modules=["q_proj", "up_proj"], bias="all")),
    "bias-lora-only": (tiny.qwen2, dict(r=2, target_modules=ATTENTION, bias="lora_only")),
    "dora": (tiny.qwen2, dict(r=3, target_modules=[*ATTENTION, "down_proj"], use_dora=True)),
    "dora-embedding": (
        tiny.llama,
        dict(r=3, target_modules=["embed_tokens", "k_proj"], use_dora=True, use_rslora=True),
    ),
    "saved": (
        tiny.llama,
        dict(r=2, target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens", "norm"]),
    ),
    "saved-linear-bias": (
        tiny.qwen2,
        dict(r=2, target_modules=["up_proj"], modules_to_save=["self_attn"], bias="all"),
    ),
    "saved-tied": (
        lambda: tiny.llama(tied=True),
        dict(r=2, target_modules=ATTENTION, modules_to_save=["embed_tokens"]),
    ),
    "saved-ensured": (
        lambda: tiny.llama(tied=True),
        dict(
            r=2,
            target_modules=ATTENTION,
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
    ),
    "embedding-and-head": (
        tiny.llama,
        dict(r=3, target_modules=["embed_tokens", "lm_head", "o_proj"]),
    ),
    "embedding-tied": (lambda: tiny.llama(tied=True), dict(r=3, target_modules=["embed_tokens"])),
    "head-tied": (lambda: tiny.llama(tied=True), dict(r=3, target_modules=["lm_head"])),
    "embedding-ensured": (
        lambda: tiny.llama(tied=True),
        dict(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True),
    ),
    "tokens": (
        tiny.llama,
        dict(r=2, target_modules=ATTENTION, trainable_token_indices=[5, 0, 36]),
    ),
    "tokens-both": (
        tiny.llama,
        dict(
            r=2,
            target_modules=ATTENTION,
            trainable_token_indices={"embed_tokens": [3, 1], "lm_head": [2]},
        ),
    ),
    "tokens-tied": (
        lambda: tiny.llama(tied=True),
        dict(r=2, target_modules=ATTENTION, trainable_token_indices=[5, 9]),
    ),
    "tokens-tied-differ": (
        lambda: tiny.llama(tied=True),
        dict(
            r=2,
            target_modules=ATTENTION,
            trainable_token_indices={"embed_tokens": [3, 1], "lm_head": [2]},
        ),
    ),
    "conv1d": (
        tiny.gpt2,
        dict(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, bias="all"),
    ),
    "conv1d-dora": (
        tiny.gpt2,
        dict(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True),
    ),
    "conv1d-saved": (
        tiny.gpt2,
        dict(r=3, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["c_fc", "ln_f"]),
    ),
    "pissa": (tiny.llama, dict(r=4, target_modules=ATTENTION, init_lora_weights="pissa")),
    "pissa-rslora": (
        tiny.llama,
        dict(
            r=4,
            lora_alpha=3,
            use_rslora=True,
            target_modules=["k_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            init_lora_weights="pissa",
        ),
    ),
    "pissa-dora": (
        tiny.llama,
        dict(r=4, target_modules=ATTENTION, init_lora_weights="pissa", use_dora=True),
    ),
    "pissa-conv1d": (
        tiny.gpt2,
        dict(r=4, target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True),
    ),
    "olora": (
        tiny.llama,
        dict(r=4, lora_alpha=2, target_modules=[*ATTENTION, "up_proj"], init_lora_weights="olora"),
    ),
    "orthogonal": (tiny.llama, dict(r=4, target_modules=ATTENTION, init_lora_weights="orthogonal")),
    "mica": (tiny.llama, dict(r=4, target_modules=ATTENTION, init_lora_weights="mica")),
    "gaussian": (tiny.llama, dict(r=4, target_modules=ATTENTION, init_lora_weights="gaussian")),
}


def make(folder: Path, build: Callable[[], Any], settings: dict[str, Any], **options: Any) -> None:
    """An adapter as PEFT saves it, with noise on all it trained."""
    model = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            biased = settings.get("bias", "none") != "none" and name.endswith("bias")
            if parameter.requires_grad or biased or "lora_" in name:
                noise = torch.rand_like(parameter) if "magnitude" in name else None
                parameter.add_(torch.randn_like(parameter) * 0.2 if noise is None else noise)
    model.save_pretrained(str(folder), **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_serves_what_peft_serves(case: str, tmp_path: Path) -> None:
    build, settings = CASES[case]
    make(tmp_path, build, settings)
    reference = PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    fresh = build()
    base = tiny.spec_of(fresh)
    before = tiny.logits(fresh)
    adapter = load(tmp_path, base)
    tiny.apply(fresh, base, adapter.modules)
    wanted = tiny.logits(reference)
    assert (wanted - before).abs().max() > 1e-3, "the adapter does nothing, so nothing is tested"
    torch.testing.assert_close(tiny.logits(fresh), wanted, rtol=1e-5, atol=2e-5)


def adapter_of(tmp_path: Path, case: str) -> Adapter:
    build, settings = CASES[case]
    make(tmp_path, build, settings)
    return load(tmp_path, tiny.spec_of(build()))


def test_scaling_known_answers(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, "patterns")
    q = "model.layers.{}.self_attn.q_proj"
    o = "model.layers.{}.self_attn.o_proj"
    found = {
        name: (group[0].a.shape[0], group[0].scale)
        for name, group in adapter.modules.items()
        if isinstance(group[0], LowRank)
    }
    assert found[q.format(0)] == (7, 8 / 7)
    assert found[q.format(2)] == (7, 0.5 / 7)
    assert found[o.format(1)] == (1, 8.0)
    assert found[o.format(0)] == (4, 2.0)
    assert found["model.layers.0.self_attn.v_proj"] == (4, 8.0)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    (low,) = adapter_of(tmp_path, "rslora").modules["model.layers.0.self_attn.q_proj"]
    assert isinstance(low, LowRank)
    assert low.scale == pytest.approx(3 / 5**0.5)


def test_primitives_are_the_smallest(tmp_path: Path) -> None:
    assert adapter_of(tmp_path / "a", "dora").primitives == ("LowRank", "Scale")
    assert adapter_of(tmp_path / "b", "lora-bias").primitives == ("Bias", "LowRank")
    assert adapter_of(tmp_path / "c", "tokens").primitives == ("LowRank", "ReplaceRows")
    adapter = adapter_of(tmp_path / "d", "tokens-tied")
    assert isinstance(adapter.modules["lm_head"][0], ReplaceRows)
    adapter = adapter_of(tmp_path / "e", "pissa")
    (low,) = adapter.modules["model.layers.0.self_attn.q_proj"]
    assert isinstance(low, LowRank) and low.a.shape[0] == 8
    assert adapter.notes == ("pissa converted to plain LoRA of twice the rank",)


def test_an_embedding_saved_along_is_not_stored_twice(tmp_path: Path) -> None:
    """PEFT saves the base's embedding beside its LoRA; it is the base's own."""
    adapter = adapter_of(tmp_path, "embedding-and-head")
    assert "model.embed_tokens.base_layer.weight" in str(
        (tmp_path / "adapter_model.safetensors").read_bytes()[:4000]
    )
    assert adapter.primitives == ("LowRank",)


@pytest.mark.parametrize(
    ("case", "saved"),
    [
        ("embedding-and-head", ["model.embed_tokens"]),
        ("embedding-tied", ["model.embed_tokens", "lm_head"]),
        ("head-tied", ["model.embed_tokens", "lm_head"]),
        ("every-linear", ["model.embed_tokens"]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_changed_embedding_is_served(case: str, saved: list[str], tmp_path: Path) -> None:
    """Saved along with its LoRA it is folded into one weight; shared, both modules have it."""
    build, settings = CASES[case]
    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.5)
    make(tmp_path, lambda: model, settings, save_embedding_layers=True)
    reference = PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    fresh = build()
    base = tiny.spec_of(fresh)
    adapter = load(tmp_path, base)
    for name in saved:
        assert [type(p) for p in adapter.modules[name]] == [Replace]
    tiny.apply(fresh, base, adapter.modules)
    torch.testing.assert_close(tiny.logits(fresh), tiny.logits(reference), rtol=1e-5, atol=2e-5)


def test_two_weights_for_one_shared_parameter(tmp_path: Path) -> None:
    build, settings = CASES["head-tied"]
    make(tmp_path, build, settings, save_embedding_layers=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.lm_head.base_layer.weight"
    save_file(tensors | {name: tensors[name] + 1}, file)
    load(tmp_path, tiny.spec_of(build()))
    both = tensors | {name.replace(".base_layer", ""): tensors[name] + 1}
    save_file(both, file)
    with pytest.raises(InvalidAdapter, match="are one parameter"):
        load(tmp_path, tiny.spec_of(build()))
    embedding = {"base_model.model.model.embed_tokens.weight": tensors[name]}
    save_file(tensors | embedding | {name: tensors[name] + 1}, file)
    with pytest.raises(InvalidAdapter, match="two different ones"):
        load(tmp_path, tiny.spec_of(build()))


def test_ensured_tying_needs_both_tensors(tmp_path: Path) -> None:
    """PEFT fails with a KeyError there."""
    build, settings = CASES["saved-ensured"]
    make(tmp_path, build, settings)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(InvalidAdapter, match=r"'base_model.model.lm_head.weight' is missing"):
        load(tmp_path, tiny.spec_of(build()))


def test_norm_weights_and_biases_lower_to_replace_and_bias(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, "conv1d-saved")
    kinds = {type(p) for p in adapter.modules["transformer.ln_f"]}
    assert kinds == {Replace, Bias}
    assert Scale not in {type(p) for group in adapter.modules.values() for p in group}


def test_a_zero_adapter_is_legal(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=ATTENTION))
    model.save_pretrained(str(tmp_path))
    adapter = load(tmp_path, tiny.spec_of(tiny.llama()))
    assert len(adapter.modules) == 6


def test_digest_names_content(tmp_path: Path) -> None:
    build, settings = CASES["plain"]
    make(tmp_path / "a", build, settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    make(tmp_path / "c", lambda: tiny.llama(seed=1), settings)
    make(tmp_path / "d", build, settings | {"lora_alpha": 9})
    base = tiny.spec_of(build())
    one, same, other, config = (load(tmp_path / name, base).digest for name in "abcd")
    assert one == same
    assert len({one, other, config}) == 3
