"""BitDelta's published layout, packed here as its authors pack it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from deltaserve.adapters.errors import InvalidAdapter, UnsupportedAdapter
from deltaserve.adapters.fingerprint import tensor_digest
from deltaserve.adapters.load import load
from deltaserve.kernels.primitives import Bit, Replace

from . import tiny

WIDE = tiny.SHAPE | dict(hidden_size=64, intermediate_size=96)


def build(seed: int = 0, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=tied)).eval()


def published(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """diff.py of FasterDecoding/BitDelta, written down from its description: bit b of word k of
    column o is 1 if the delta of input 32 k + b to output o is not negative."""
    file: dict[str, Tensor] = {}
    for name, parameter in tuned.state_dict().items():
        module = name.removesuffix(".weight")
        if "proj" not in name:
            file[name] = parameter.clone()
            continue
        delta = parameter - base.get_submodule(module).weight
        words = torch.zeros(delta.shape[1] // 32, delta.shape[0], dtype=torch.int64)
        for i in range(delta.shape[1]):
            words[i // 32] += (delta[:, i] >= 0).long() << (i % 32)
        file[f"{module}.mask"] = words.to(torch.int32)
        file[f"{module}.coeff"] = delta.abs().mean()
    return file


def tune(model: Any, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    tiny.randomize(model, "proj", 0.02)
    tiny.randomize(model, "lm_head", 0.1)
    tiny.randomize(model, "layernorm", 0.1)
    return model


def reference(file: dict[str, Tensor], tied: bool = False) -> Any:
    """The base with the diff applied as the authors' load_diff and BinaryDiff do it."""
    model = build(tied=tied)
    with torch.no_grad():
        for name, value in file.items():
            module, _, what = name.rpartition(".")
            if what == "weight":
                model.get_submodule(module).weight.copy_(value)
            elif what == "mask":
                bits = torch.stack([(value >> b) & 1 for b in range(32)], dim=1).flatten(0, 1)
                delta = file[f"{module}.coeff"] * (2 * bits - 1)
                model.get_submodule(module).weight.add_(delta.T)
    return model


def test_serves_what_its_authors_serve(tmp_path: Path) -> None:
    file = published(build(), tune(build()))
    save_file(file, tmp_path / "diff.safetensors")
    fresh = build()
    base = tiny.spec_of(fresh)
    for path in (tmp_path, tmp_path / "diff.safetensors"):
        adapter = load(path, base)
    assert adapter.format == "bitdelta"
    assert adapter.primitives == ("Bit", "Replace")
    assert "model.embed_tokens" not in adapter.modules, "it equals the base's"
    before = tiny.logits(fresh)
    tiny.apply(fresh, base, adapter.modules)
    wanted = tiny.logits(reference(file))
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(tiny.logits(fresh), wanted, rtol=1e-4, atol=2e-5)


def test_a_tied_head_changes_with_the_embedding(tmp_path: Path) -> None:
    tuned = build(tied=True)
    tiny.randomize(tuned, "proj", 0.02)
    tiny.randomize(tuned, "embed_tokens", 0.1)
    file = published(build(tied=True), tuned)
    del file["lm_head.weight"]
    save_file(file, tmp_path / "diff.safetensors")
    fresh = build(tied=True)
    base = tiny.spec_of(fresh)
    adapter = load(tmp_path, base)
    assert isinstance(adapter.modules["lm_head"][0], Replace)
    tiny.apply(fresh, base, adapter.modules)
    wanted = tiny.logits(reference(file, tied=True))
    torch.testing.assert_close(tiny.logits(fresh), wanted, rtol=1e-4, atol=2e-5)


def test_known_words(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj"
    words = torch.zeros(2, 32, dtype=torch.int64)
    words[1, 3] = 0x80000005
    file = {f"{name}.mask": words.to(torch.int32), f"{name}.coeff": torch.tensor(0.5)}
    save_file(file, tmp_path / "diff.safetensors")
    (bit,) = load(tmp_path, tiny.spec_of(build())).modules[name]
    assert isinstance(bit, Bit)
    assert bit.signs[0, 3].tolist() == [0, 0, 0, 0, 5, 0, 0, 0x80]
    assert bit.scale.tolist() == [[0.5] * 32]


def test_equal_by_digest_alone(tmp_path: Path) -> None:
    """A quantized base no longer holds the weight it was made from, but knows its digest."""
    file = published(build(), tune(build()))
    save_file(file, tmp_path / "diff.safetensors")
    digest = tensor_digest(file["model.embed_tokens.weight"])
    whole = tiny.spec_of(build())
    for digests, kept in (({"model.embed_tokens.weight": digest}, False), ({}, True)):
        base = tiny.spec_of(
            build(), tensor_digests=digests, weight=lambda name: whole.weight(name) * 1.01
        )
        assert ("model.embed_tokens" in load(tmp_path, base).modules) is kept


def refusal(tmp_path: Path, changes: dict[str, Tensor | None]) -> str:
    file: dict[str, Tensor | None] = {**published(build(), tune(build())), **changes}
    save_file({k: v for k, v in file.items() if v is not None}, tmp_path / "diff.safetensors")
    with pytest.raises((InvalidAdapter, UnsupportedAdapter)) as error:
        load(tmp_path, tiny.spec_of(build()))
    return str(error.value)


def test_refusals(tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    assert "vocabulary of 38 tokens" in refusal(tmp_path, {"lm_head.weight": torch.ones(38, 64)})
    assert "has 37" in refusal(tmp_path, {"model.embed_tokens.weight": torch.ones(38, 64)})
    assert "one number" in refusal(tmp_path, {f"{q}.coeff": None})
    assert "not understood" in refusal(tmp_path, {f"{q}.mask": None})
    assert "needs int32" in refusal(tmp_path, {f"{q}.mask": torch.ones(2, 64).long()})
    assert "= [2, 64]" in refusal(tmp_path, {f"{q}.mask": torch.ones(64, 2).int()})
    assert "does not have" in refusal(tmp_path, {"model.layers.7.mlp.up_proj.A": torch.ones(2)})
    assert "not understood" in refusal(tmp_path, {f"{q}.A": torch.ones(2)})
    assert "stands alone" in refusal(tmp_path, {f"{q}.weight": torch.ones(64, 64)})
    assert "not finite" in refusal(tmp_path, {f"{q}.coeff": torch.tensor(float("inf"))})
    assert "has no bias" in refusal(tmp_path, {f"{q}.bias": torch.ones(64)})
