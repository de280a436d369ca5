"""Tiny random models of several shapes, their BaseSpec, and applying primitives densely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from deltaserve.adapters.base import BaseSpec, LayerKV, ModuleKind, ModuleSpec
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    LowRank,
    Primitive,
    Replace,
    ReplaceRows,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
    unpack_signs,
)

SHAPE: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def llama(tied: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval()


def qwen2(tied: bool = False, seed: int = 0) -> nn.Module:
    """Its q, k and v have biases, here not zero."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied)).eval()
    randomize(model, "bias")
    return model


def gpt2(seed: int = 0) -> nn.Module:
    """Its linears are Conv1D, stored [in, out]."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=37, n_embd=24, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    randomize(model, "bias")
    return model


def randomize(model: nn.Module, part: str, std: float = 0.3) -> None:
    """Noise on every parameter whose name has ``part``, so that no adapter is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter) * std)


def spec_of(model: nn.Module, **changes: Any) -> BaseSpec:
    """The BaseSpec of a model that is served unquantized."""
    config = model.config
    modules: dict[str, ModuleSpec] = {}
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        kind, transposed = ModuleKind.LINEAR, isinstance(module, Conv1D)
        weight = weight.detach().clone().float()
        out, in_ = weight.shape[0], weight.shape[-1]
        if isinstance(module, nn.Embedding):
            kind = ModuleKind.EMBEDDING
        if transposed or kind is ModuleKind.EMBEDDING:
            out, in_ = in_, out
        elif weight.ndim == 1:
            kind = ModuleKind.NORM
        bias = getattr(module, "bias", None)
        modules[name] = ModuleSpec(
            name, kind, in_, out, bias is not None, transposed, type(module).__name__
        )
        weights[name] = weight
        if bias is not None:
            biases[name] = bias.detach().clone().float()
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    kv = LayerKV(getattr(config, "num_key_value_heads", heads), size, size)
    embedding = next(n for n, m in modules.items() if m.kind is ModuleKind.EMBEDDING)
    values: dict[str, Any] = dict(
        modules=modules,
        layers=(kv,) * config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        name="tiny",
        fingerprint="",
        held_fingerprint="",
        quantization="none",
        config=config.to_dict(),
        weight=lambda name: weights[name],
        bias=lambda name: biases.get(name),
        tied={"lm_head": embedding} if config.tie_word_embeddings else {},
    )
    return BaseSpec(**(values | changes))


def delta_of(p: Primitive, module: ModuleSpec) -> Tensor:
    """The dense [out, in] of an additive primitive, float64."""
    dense = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
    match p:
        case LowRank(a=a, b=b, scale=scale):
            dense += scale * (b.double() @ a.double())
        case Bit(signs=signs, scale=scale):
            for plane, factor in zip(signs, scale, strict=True):
                dense += factor.double()[:, None] * unpack_signs(plane, module.in_features)
        case SparseCsr(indptr=indptr, indices=indices, values=values):
            for row in range(module.out_features):
                for i in range(int(indptr[row]), int(indptr[row + 1])):
                    dense[row, int(indices[i])] += values[i]
        case SparseRows(index=index, values=values):
            dense[index] += values.double()
        case SparseCols(index=index, values=values):
            dense[:, index] += values.double()
        case SparseBlocks(index=index, values=values):
            h, w = values.shape[1:]
            for (row, column), block in zip(index.tolist(), values, strict=True):
                dense[row * h : row * h + h, column * w : column * w + w] += block
    return dense


def effective(base: BaseSpec, name: str, group: tuple[Primitive, ...]) -> tuple[Tensor, Tensor]:
    """Weight [out, in] ([hidden] of a norm) and bias [out] with the primitives applied, in
    float64, written from the formula in `deltaserve.kernels.primitives` and nothing else."""
    module = base.modules[name]
    weight = base.weight(name).double()
    weight = weight.T if module.transposed else weight
    own = base.bias(name)
    bias = torch.zeros(module.out_features).double() if own is None else own.double()
    embedding = module.kind is ModuleKind.EMBEDDING
    for p in group:
        if isinstance(p, Replace):
            weight = p.weight.double()
        elif isinstance(p, ReplaceRows):
            weight = weight.index_copy(0, p.index, p.values.double())
    weight = weight.T if embedding else weight
    for p in group:
        if isinstance(p, Scale):
            weight = weight * (1 if p.input is None else p.input.double())
            weight = weight * (1 if p.output is None else p.output.double()[:, None])
    for p in group:
        if isinstance(p, Bias):
            bias = bias + p.bias.double()
        elif not isinstance(p, Replace | ReplaceRows | Scale):
            weight = weight + delta_of(p, module)
    return weight, bias


def apply(model: nn.Module, base: BaseSpec, groups: Mapping[str, tuple[Primitive, ...]]) -> None:
    """Give a fresh copy of the base the effective weights; a tied head gets its own weight."""
    for name, group in groups.items():
        weight, bias = effective(base, name, group)
        module, spec = model.get_submodule(name), base.modules[name]
        flip = spec.transposed or spec.kind is ModuleKind.EMBEDDING
        module.weight = nn.Parameter((weight.T if flip else weight).float().contiguous())
        if getattr(module, "bias", None) is not None or bool(bias.any()):
            module.bias = nn.Parameter(bias.float())


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    torch.manual_seed(7)
    tokens = torch.randint(0, 37, (2, 9))
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits
