"""Adapters on a loaded model: what is taken, what is refused, and that nothing stays behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import archs
import pytest
import torch
from stepping import Sequence, Stepper
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import InvalidAdapter, UnsupportedAdapter
from deltaserve.kernels.primitives import (
    Bias,
    LowRank,
    Prefix,
    PrefixKV,
    Primitive,
    PromptEmbeddings,
    Replace,
    ReplaceRows,
    Scale,
)
from deltaserve.server.model import BaseModel, load

Save = Callable[[PreTrainedModel], Path]
AT = 5  # of 13: the later half of the prompt, and two decodes
Q, K = (f"model.layers.0.self_attn.{p}_proj" for p in "qk")


def of(modules: dict[str, tuple[Primitive, ...]], prefix: Prefix | None = None) -> Adapter:
    return Adapter(digest="d", format="test", modules=modules, prefix=prefix)


def low_rank(out: int, inner: int = 64, rank: int = 2) -> LowRank:
    return LowRank(torch.randn(rank, inner) * 0.3, torch.randn(out, rank) * 0.3)


def run(model: BaseModel, sequence: Sequence) -> Tensor:
    """Logits of the positions from AT on."""
    stepper = Stepper(model)
    stepper.step([(sequence, sequence.left - 2)])
    stepper.step([(sequence, 1)])
    stepper.step([(sequence, 1)])
    return torch.cat(sequence.logits)


def reference(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return found


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 256, (13,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_a_removed_adapter_leaves_the_base_bit_for_bit(
    quantize: str, saved: Save, ids: Tensor
) -> None:
    model = load(saved(archs.build("qwen3")), dtype=torch.float32, quantize=quantize)
    before = run(model, Sequence(ids))
    modules: dict[str, tuple[Primitive, ...]] = {
        Q: (low_rank(64),),
        "lm_head": (low_rank(256),),
        "model.embed_tokens": (ReplaceRows(torch.arange(256), torch.randn(256, 64)),),
        "model.layers.1.self_attn.q_norm": (Replace(torch.randn(16)),),
        "model.norm": (Replace(torch.randn(64)), Bias(torch.randn(64))),
    }
    prepared = model.prepare(of(modules))
    assert prepared.nbytes >= 4 * (256 * 64 + 2 * 128 + 2 * 320 + 16 + 128)
    model.install(4, prepared)
    tuned = run(model, Sequence(ids, ((4, 1.0),)))
    assert (tuned - before).abs().max() > 0.1
    beside = Sequence(ids)
    other = Sequence(ids.flip(0), ((4, 1.0),))
    stepper = Stepper(model)
    stepper.step([(beside, 11), (other, 5)])
    assert beside.at == list(range(AT, 11))
    torch.testing.assert_close(beside.logits[0], before[: 11 - AT], rtol=0, atol=2e-5)
    model.remove(4)
    assert torch.equal(run(model, Sequence(ids)), before)
    model.install(4, model.prepare(of({K: (low_rank(32),)})))
    assert not torch.equal(run(model, Sequence(ids, ((4, 1.0),))), tuned)


def test_members_of_one_group_are_adapted_apart(saved: Save, ids: Tensor) -> None:
    plain = archs.build("llama")
    model = load(saved(plain), dtype=torch.float32)
    update = low_rank(32)
    factors = torch.rand(32) + 0.5
    model.install(1, model.prepare(of({K: (update, Scale(output=factors))})))
    tuned = copy.deepcopy(plain)
    module = tuned.get_submodule(K)
    weight = module.weight.detach()
    module.weight = nn.Parameter(factors[:, None] * weight + update.b @ update.a)
    got = run(model, Sequence(ids, ((1, 1.0),)))
    torch.testing.assert_close(got, reference(tuned, ids)[AT:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_virtual_tokens_override_the_embedding(name: str, saved: Save, ids: Tensor) -> None:
    plain = archs.build(name)
    model = load(saved(plain), dtype=torch.float32)
    prompt = torch.randn(5, 64)
    prefix = model.prepare(of({}, PromptEmbeddings(prompt.double()))).prefix
    assert isinstance(prefix, PromptEmbeddings) and prefix.embeddings.dtype == torch.float32
    sequence = Sequence(torch.cat([torch.zeros(5, dtype=torch.long), ids]))
    model.ctx.embedding_override = (torch.arange(5), prefix.embeddings)
    stepper = Stepper(model)
    stepper.step([(sequence, 16)])
    model.ctx.embedding_override = None
    stepper.step([(sequence, 1)])
    stepper.step([(sequence, 1)])
    with torch.inference_mode():
        rows = plain.get_input_embeddings()(ids)
        inputs = torch.cat([prompt, rows])[None]
        want = plain(inputs_embeds=inputs, use_cache=False).logits[0]
    got = torch.cat(sequence.logits)
    torch.testing.assert_close(got, want[sequence.at], rtol=0, atol=1e-4)


def test_prefixes_must_fit(saved: Save) -> None:
    model = load(saved(archs.build("llama")), dtype=torch.bfloat16)
    good = tuple(torch.randn(3, 2, 16) for _ in range(2))
    prefix = model.prepare(of({}, PrefixKV(good, good))).prefix
    assert isinstance(prefix, PrefixKV) and prefix.keys[1].dtype == torch.bfloat16
    wrong = tuple(torch.randn(3, 4, 16) for _ in range(2))
    with pytest.raises(InvalidAdapter, match=r"layer 0 .* \(3, 4, 16\), must be \(3, 2, 16\)"):
        model.prepare(of({}, PrefixKV(wrong, good)))
    with pytest.raises(InvalidAdapter, match="keys for 1 and"):
        model.prepare(of({}, PrefixKV(good[:1], good)))
    with pytest.raises(InvalidAdapter, match="64"):
        model.prepare(of({}, PromptEmbeddings(torch.randn(3, 63))))


def test_modules_that_cannot_take_an_adapter(saved: Save) -> None:
    model = load(saved(archs.build("mixtral")), dtype=torch.float32)
    for name, reason in {
        "model.layers.0.mlp.experts": "fused experts",
        "model.layers.0.mlp.experts.gate_up_proj": "fused experts",
        "model.layers.7.self_attn.q_proj": "no such",
    }.items():
        with pytest.raises(UnsupportedAdapter, match=reason) as caught:
            model.prepare(of({name: (low_rank(64),)}))
        assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "primitive"),
    [
        (Q, LowRank(torch.ones(2, 63), torch.ones(64, 2))),
        ("model.norm", LowRank(torch.ones(2, 64), torch.ones(64, 2))),
        ("model.embed_tokens", Bias(torch.ones(64))),
    ],
)
def test_primitives_that_a_module_does_not_take(
    name: str, primitive: Primitive, saved: Save
) -> None:
    model = load(saved(archs.build("llama")), dtype=torch.float32)
    with pytest.raises(UnsupportedAdapter, match=name):
        model.prepare(of({name: (primitive,)}))


def test_what_cannot_be_composed(saved: Save) -> None:
    model = load(saved(archs.build("llama")), dtype=torch.float32)
    lora = of({Q: (low_rank(64),)})
    prompt = of({}, PromptEmbeddings(torch.randn(3, 64)))
    inputs = of({Q: (Scale(input=torch.ones(64)),)})
    outputs = of({Q: (Scale(output=torch.ones(64)),)})
    assert model.composable([(lora, 0.3), (lora, -2.0), (prompt, 1.0), (inputs, 0.5)]) is None
    assert "virtual tokens" in (model.composable([(prompt, 1.0), (prompt, 1.0)]) or "")
    assert "strength 0.5" in (model.composable([(prompt, 0.5)]) or "")
    assert Q in (model.composable([(inputs, 1.0), (outputs, 1.0)]) or "")


def test_two_models_share_nothing(tmp_path: Path, ids: Tensor) -> None:
    models = []
    for seed in (0, 1):
        plain = archs.build("llama", seed=seed)
        plain.save_pretrained(tmp_path / str(seed))
        models.append((plain, load(tmp_path / str(seed), dtype=torch.float32)))
    sequences = [Sequence(ids), Sequence(ids)]
    steppers = [Stepper(model) for _, model in models]
    for count in (9, 1, 3):
        for stepper, sequence in zip(steppers, sequences, strict=True):
            stepper.step([(sequence, count)])
    for (plain, _), sequence in zip(models, sequences, strict=True):
        want = reference(plain, ids)[sequence.at]
        torch.testing.assert_close(torch.cat(sequence.logits), want, rtol=0, atol=1e-4)
