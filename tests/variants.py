"""Tiny bases and adapters of every kind, each with an independent reference.

A variant is made on disk (by PEFT itself where PEFT has the method) and referred to through
transformers + PEFT, or, for deltas that PEFT does not know, through a merged float32 model whose
weights are computed here from the formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from deltaserve.adapters.delta_file import write_delta
from deltaserve.adapters.extract import bitdelta_from
from deltaserve.kernels.primitives import (
    Replace,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
)

Logits = Callable[[list[int]], Tensor]
"""Token ids -> float32 [len, vocabulary]."""

VOCAB = 260
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama-tied-biased": lambda: LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**COMMON, tie_word_embeddings=False),
    "mistral-sliding": lambda: MistralConfig(**COMMON, sliding_window=16),
    "gemma2": lambda: Gemma2Config(**COMMON, sliding_window=16, query_pre_attn_scalar=16),
}


def make_base(folder: Path, arch: str, seed: int = 0) -> None:
    """A random checkpoint with a byte-level tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(BASES[arch](), dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(std=0.5 if "embed" in name else 0.15)
            elif "norm" in name:
                p.add_(torch.randn_like(p) * 0.1)
            else:
                p.normal_(std=0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def open_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Without the virtual tokens that prompt tuning puts in front."""
    out: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return out[-len(ids) :].float()


@dataclass(frozen=True)
class Variant:
    """make(base folder, folder to write, generator). reference(base model, folder) -> its own
    model. additive: it is a change of weights, so it can be weighted and combined."""

    name: str
    make: Callable[[Path, Path, torch.Generator], None]
    reference: Callable[[Any, Path], Any]
    additive: bool = True


# Made by PEFT:


def peft_variant(name: str, config: Callable[[Any], Any], *, additive: bool = True) -> Variant:
    def make(base: Path, folder: Path, generator: torch.Generator) -> None:
        model = open_base(base)
        wrapped = get_peft_model(model, config(model.config))
        randomize(wrapped, generator)
        wrapped.save_pretrained(folder)

    def reference(base: Any, folder: Path) -> Any:
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()

    return Variant(name, make, reference, additive)


def randomize(wrapped: Any, generator: torch.Generator) -> None:
    """Give every trained parameter values that matter."""

    def noise(p: Tensor, std: float) -> Tensor:
        return torch.randn(p.shape, generator=generator) * std

    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if not p.requires_grad:
                continue
            if "lora_A" in name or "lora_embedding_A" in name:
                p.copy_(noise(p, p.shape[-1] ** -0.5))
            elif "lora_B" in name or "lora_embedding_B" in name:
                p.copy_(noise(p, 0.1))
            elif "lora_magnitude_vector" in name or "ia3_l" in name:
                p.mul_(1 + noise(p, 0.25))
            elif "shira" in name:
                p.copy_(noise(p, 0.2))
            elif "prompt_encoder" in name:
                p.copy_(noise(p, 0.5))
            elif "trainable_tokens" in name:
                p.add_(noise(p, 0.3))
            else:  # modules_to_save, biases
                p.add_(noise(p, 0.05))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**fields: Any) -> Callable[[Any], Any]:
    given: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ALL, **fields}
    return lambda config: LoraConfig(task_type="CAUSAL_LM", **given)


def prompt_tuning(config: Any) -> Any:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)


def prefix_tuning(config: Any) -> Any:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=11)


# Deltas of our own formats:


def linears(model: Any) -> dict[str, Any]:
    return {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    }


def keep(folder: Path, added: dict[str, Tensor], set_: dict[str, Tensor]) -> None:
    """Beside the adapter: what its reference adds to weights, and sets them to."""
    torch.save({"added": added, "set": set_}, folder.with_suffix(".reference.pt"))


def merged(base: Any, folder: Path) -> Any:
    """A reference: the base with its weights changed by what was kept beside the adapter."""
    model = copy.deepcopy(base)
    kept = torch.load(folder.with_suffix(".reference.pt"), weights_only=True)
    with torch.no_grad():
        for name, delta in kept["added"].items():
            model.get_submodule(name).weight.add_(delta)
        for name, value in kept["set"].items():
            model.get_submodule(name).weight.copy_(value)
    return model


def signs_of(delta: Tensor) -> Tensor:
    return torch.where(delta >= 0, 1.0, -1.0)


def make_bitdelta(base: Path, folder: Path, generator: torch.Generator) -> None:
    model = open_base(base)
    modules, kept = {}, {}
    for name, linear in linears(model).items():
        delta = torch.randn(linear.weight.shape, generator=generator) * 0.1
        modules[name] = (bitdelta_from(linear.weight, linear.weight + delta),)
        # the change as it is in float32, rounding of the sum included
        exact = (linear.weight + delta) - linear.weight
        kept[name] = (signs_of(exact) * exact.abs().mean()).detach()
    write_delta(folder, modules, kind="bitdelta")
    keep(folder, kept, {})


def make_bitdelta_published(base: Path, folder: Path, generator: torch.Generator) -> None:
    """The authors' `diff.pt` as safetensors: masks packed along the input, first bit lowest."""
    model = open_base(base)
    stored: dict[str, Tensor] = {}
    kept, gains = {}, {}
    for name, linear in linears(model).items():
        delta = torch.randn(linear.weight.shape, generator=generator) * 0.1
        positive = (delta >= 0).T.reshape(-1, 32, linear.out_features)  # [in / 32, 32, out]
        words = (positive.long() << torch.arange(32)[None, :, None]).sum(1)
        stored[f"{name}.mask"] = (
            torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
        )
        stored[f"{name}.coeff"] = delta.abs().mean()
        kept[name] = signs_of(delta) * delta.abs().mean()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            stored[f"{name}.weight"] = gains[name] = module.weight.detach() + 0.1
    folder.mkdir()
    save_file(stored, folder / "diff.safetensors")
    keep(folder, kept, gains)


def make_sparse(base: Path, folder: Path, generator: torch.Generator) -> None:
    """CSR, whole rows, whole columns and blocks, by turns."""
    modules, kept = {}, {}
    for i, (name, linear) in enumerate(linears(open_base(base)).items()):
        delta = torch.zeros_like(linear.weight)
        out, in_ = delta.shape
        if i % 4 == 0:
            delta[torch.rand(delta.shape, generator=generator) < 0.03] = 0.3
            present = delta != 0
            indptr = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])
            columns = present.nonzero()[:, 1].to(torch.int32)
            primitive: Any = SparseCsr(indptr, columns, delta[present].clone())
        elif i % 4 == 1:
            rows = torch.randperm(out, generator=generator)[:5]
            delta[rows] = torch.randn(5, in_, generator=generator) * 0.2
            primitive = SparseRows(rows, delta[rows].clone())
        elif i % 4 == 2:
            columns = torch.randperm(in_, generator=generator)[:5]
            delta[:, columns] = torch.randn(out, 5, generator=generator) * 0.2
            primitive = SparseCols(columns, delta[:, columns].contiguous())
        else:
            delta[8:16, 16:32] = 0.2
            delta[0:8, 0:16] = -0.2
            blocks = torch.stack([delta[8:16, 16:32], delta[0:8, 0:16]])
            primitive = SparseBlocks(torch.tensor([[1, 1], [0, 0]]), blocks)
        modules[name] = (primitive,)
        kept[name] = delta.detach()
    write_delta(folder, modules, kind="sparse")
    keep(folder, kept, {})


def make_half(base: Path, folder: Path, generator: torch.Generator) -> None:
    """Half of the linears, one norm and the head are other tensors."""
    model = open_base(base)
    names = [n for i, n in enumerate(linears(model)) if i % 2]
    names += [n for n, _ in model.named_modules() if n.endswith("norm")][:1]
    if not model.config.tie_word_embeddings:
        names.append("lm_head")
    kept = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        kept[name] = weight + torch.randn(weight.shape, generator=generator) * 0.1
    write_delta(folder, {n: (Replace(w),) for n, w in kept.items()}, kind="half-fine-tune")
    keep(folder, {}, kept)


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in [
        peft_variant("lora", lora()),
        peft_variant("lora-r11", lora(r=11, target_modules=["q_proj", "v_proj", "down_proj"])),
        peft_variant("rslora", lora(use_rslora=True, r=8)),
        peft_variant(
            "lora-patterns",
            lora(
                rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
                alpha_pattern={"v_proj": 3},
                layers_to_transform=[1],
            ),
        ),
        peft_variant("dora", lora(use_dora=True)),
        peft_variant("lora-bias", lora(lora_bias=True)),
        peft_variant("lora-modules-to-save", lora(modules_to_save=["lm_head"])),
        peft_variant("lora-embedding", lora(target_modules=[*ALL, "embed_tokens"])),
        peft_variant("lora-tokens", lora(trainable_token_indices=[3, 70, 200])),
        peft_variant(
            "ia3",
            lambda config: IA3Config(
                task_type="CAUSAL_LM",
                target_modules=["k_proj", "v_proj", "down_proj"],
                feedforward_modules=["down_proj"],
            ),
        ),
        peft_variant(
            "shira",
            lambda config: ShiraConfig(
                task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "o_proj", "up_proj"]
            ),
        ),
        peft_variant("prompt-tuning", prompt_tuning, additive=False),
        peft_variant("prefix-tuning", prefix_tuning, additive=False),
        Variant("bitdelta", make_bitdelta, merged),
        Variant("bitdelta-published", make_bitdelta_published, merged),
        Variant("sparse", make_sparse, merged),
        Variant("half-fine-tune", make_half, merged),
    ]
}


def interpolated(base: Any, tuned: list[tuple[Any, float]]) -> Any:
    """The base with every parameter W + sum of strength * (W_tuned - W)."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        own = dict(base.named_parameters(remove_duplicate=False))
        for name, p in model.named_parameters(remove_duplicate=False):
            w = own[name].detach()
            total = w.double().clone()
            for other, strength in tuned:
                theirs = dict(other.named_parameters(remove_duplicate=False))[name]
                total += strength * (theirs.detach().double() - w.double())
            p.copy_(total.float())
    return model


def merge(model: Any) -> Any:
    """PEFT's own merged model; a merged one is itself."""
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
