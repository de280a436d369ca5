"""Random-weight models of real shapes with rank-16 LoRA adapters: the speed is that of the shape,
the text is noise.

    python benchmarks/models.py --out models [--only llama-160m] [--adapters 16]

Writes OUT/<model>/ and OUT/<model>-lora/aNN/ (PEFT's own save format, all seven linears).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama-160m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "intermediate_size": 3072,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    },
    "llama-1b": {  # the shape of Llama-3.2-1B
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
    },
}


def make_model(name: str, folder: Path) -> LlamaForCausalLM:
    config = LlamaConfig(
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **SHAPES[name],
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" not in key:
                std = 0.05 if "embed" in key else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    model.save_pretrained(folder)
    byte_tokenizer(config.vocab_size).save_pretrained(folder)
    return model


def make_adapters(model: LlamaForCausalLM, folder: Path, base: str, count: int) -> None:
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base
    for i in range(count):
        generator = torch.Generator().manual_seed(1000 + i)
        with torch.no_grad():
            for key, p in wrapped.named_parameters():
                if "lora_A" in key:
                    p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
                elif "lora_B" in key:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        wrapped.save_pretrained(folder / f"a{i:02d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models"))
    parser.add_argument("--only", default=",".join(SHAPES))
    parser.add_argument("--adapters", type=int, default=16)
    args = parser.parse_args()
    for name in args.only.split(","):
        model = make_model(name, args.out / name)
        make_adapters(model, args.out / f"{name}-lora", name, args.adapters)
        print(f"wrote {args.out / name} and {args.adapters} adapters")


if __name__ == "__main__":
    main()
