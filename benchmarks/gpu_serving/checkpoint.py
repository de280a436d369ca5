"""A base checkpoint of random numbers as llm-compressor writes them (compressed-tensors,
pack-quantized, symmetric int4), which the server's loader reads straight into its int4."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from gpu_kernels.data import DEVICE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gpu_serving.sizes import Shape

SPREAD = 4.61
"""Standard deviation of the whole numbers from -8 to 7, all as likely."""


def write(folder: Path, shape: Shape, moved: Callable[[], object] = lambda: None) -> Path:
    """The checkpoint, unless it is there; a file for each layer, after which `moved` is called. The
    config comes last: a folder that has one is whole."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(DEVICE).manual_seed(1)
    places: dict[str, str] = {}
    for i in range(shape.layers):
        _save(folder, f"model-{i:05}.safetensors", _layer(shape, i, generator), places)
        moved()
    _save(folder, f"model-{shape.layers:05}.safetensors", _ends(shape, generator), places)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer(shape.config["vocab_size"]).save_pretrained(folder)
    _config(shape, quantization_config=_scheme(shape)).save_pretrained(folder)
    return folder


def outline(folder: Path, shape: Shape) -> Path:
    """A checkpoint that is not quantized, without its weights."""
    _config(shape).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    return folder


def dense_model(folder: Path, shape: Shape) -> nn.Module:
    """transformers' own model with the same weights, unpacked by the format's formula and not by
    the server's code, on the device."""
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    dtype = getattr(torch, shape.dtype)
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in _dense(folder, shape.group):
            parameters.pop(name).copy_(value)
    if parameters:
        raise RuntimeError(f"the checkpoint has no {', '.join(parameters)}")
    model.eval()
    model.generation_config.eos_token_id = -1
    return model  # type: ignore[no-any-return]


def _config(shape: Shape, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype=shape.dtype, **more, **shape.config,
    )  # fmt: skip


def _layer(shape: Shape, i: int, generator: torch.Generator) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (out, inner) in shape.linears().items():
        stem = f"model.layers.{i}.{name}"
        bits = torch.randint(
            -(1 << 31), 1 << 31, (out, inner // 8), generator=generator, device=DEVICE
        )
        tensors[f"{stem}.weight_packed"] = bits.to(torch.int32)
        scale = 0.5 + torch.rand(out, inner // shape.group, generator=generator, device=DEVICE)
        scale = (scale / (SPREAD * inner**0.5)).to(getattr(torch, shape.dtype))
        tensors[f"{stem}.weight_scale"] = scale
        tensors[f"{stem}.weight_shape"] = torch.tensor([out, inner])
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.{i}.{norm}.weight"] = _ones(shape)
    return tensors


def _ends(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Embedding, last norm and head."""
    rows, hidden = shape.config["vocab_size"], shape.config["hidden_size"]

    def drawn(factor: float) -> Tensor:
        value = torch.randn(rows, hidden, generator=generator, device=DEVICE) * factor
        return value.to(getattr(torch, shape.dtype))

    ends = {"model.embed_tokens.weight": drawn(1.0), "lm_head.weight": drawn(hidden**-0.5)}
    return {**ends, "model.norm.weight": _ones(shape)}


def _ones(shape: Shape) -> Tensor:
    return torch.ones(shape.config["hidden_size"], dtype=getattr(torch, shape.dtype))


def _save(folder: Path, file: str, tensors: dict[str, Tensor], places: dict[str, str]) -> None:
    save_file({name: t.cpu() for name, t in tensors.items()}, folder / file, {"format": "pt"})
    places.update(dict.fromkeys(tensors, file))


def _scheme(shape: Shape) -> dict[str, Any]:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": shape.group, "dynamic": False,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _dense(folder: Path, group: int) -> Iterator[tuple[str, Tensor]]:
    """Parameter -> value. w = (q - 8) scale; q is four bits of a word, the lowest first."""
    shifts = torch.arange(0, 32, 4, device=DEVICE, dtype=torch.int32)
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if not name.endswith(".weight_packed"):
                    if name.endswith(".weight"):
                        yield name, opened.get_tensor(name)
                    continue
                stem = name.removesuffix("_packed")
                words = opened.get_tensor(name).to(DEVICE)
                q = (words[..., None] >> shifts & 15).flatten(1) - 8
                scale = opened.get_tensor(f"{stem}_scale").to(DEVICE).float()
                yield stem, q * scale.repeat_interleave(group, 1)
