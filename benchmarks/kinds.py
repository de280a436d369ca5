"""Sixteen adapters of sixteen kinds with random weights, for the workload W5 of mixed.py.

    python benchmarks/kinds.py --models models [--only llama-160m]

Writes MODELS/<model>-kinds/<kind>/: PEFT's own save format for what PEFT has, delta files for the
others. The sizes are the usual ones of each method.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from models import TARGETS
from transformers import AutoModelForCausalLM

from deltaserve.adapters.delta_file import write_delta
from deltaserve.kernels.primitives import Bit, Primitive, SparseCsr, SparseRows

RANK = 16
LINEARS: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, **LINEARS}
VIRTUAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 16}
PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(use_rslora=True, **LORA),
    "dora": lambda: peft.LoraConfig(use_dora=True, **LORA),
    "lora-bias": lambda: peft.LoraConfig(lora_bias=True, **LORA),
    "adalora": lambda: peft.AdaLoraConfig(init_r=RANK, target_r=8, total_step=100, **LINEARS),
    "vera": lambda: peft.VeraConfig(r=256, **LINEARS, save_projection=True),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, **LINEARS),
    "hra": lambda: peft.HRAConfig(r=8, **LINEARS),
    "shira": lambda: peft.ShiraConfig(r=RANK, **LINEARS),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "ln-tuning": lambda: peft.LNTuningConfig(
        task_type="CAUSAL_LM", target_modules=["input_layernorm", "post_attention_layernorm"]
    ),
    "prompt-tuning": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "prefix-tuning": lambda: peft.PrefixTuningConfig(**VIRTUAL),
}
SPARSE = 0.01
ROWS = 16


def bitdelta(out: int, inner: int, generator: torch.Generator) -> Primitive:
    signs = torch.randint(0, 256, (1, out, inner // 8), dtype=torch.uint8, generator=generator)
    return Bit(signs, torch.full((1, out), 0.02 * inner**-0.5))


def sparse(out: int, inner: int, generator: torch.Generator) -> Primitive:
    row = max(1, int(SPARSE * inner))
    spread = inner // row  # one in each stretch: sorted and unique
    picked = torch.randint(0, spread, (out, row), generator=generator)
    columns = (picked + torch.arange(row) * spread).to(torch.int32)
    values = torch.randn(out * row, generator=generator) * 0.05
    return SparseCsr(torch.arange(out + 1) * row, columns.flatten(), values)


def rows(out: int, inner: int, generator: torch.Generator) -> Primitive:
    index = torch.randperm(out, generator=generator)[:ROWS]
    return SparseRows(index, torch.randn(ROWS, inner, generator=generator) * 0.2 * inner**-0.5)


DELTAS = {"bitdelta": bitdelta, "sparse": sparse, "sparse-rows": rows}
KINDS = (*PEFT, *DELTAS)


def make_kinds(models: Path, name: str) -> None:
    """Writes those that are not there yet."""
    folder = models / f"{name}-kinds"
    for i, kind in enumerate(KINDS):
        if (folder / kind).exists():
            continue
        generator = torch.Generator().manual_seed(2000 + i)
        if kind in PEFT:
            save_peft(models / name, PEFT[kind](), folder / kind, generator)
        else:
            save_delta(models / name, kind, folder / kind, generator)


def save_peft(base: Path, config: Any, folder: Path, generator: torch.Generator) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    wrapped: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                std = p.shape[-1] ** -0.5 if "lora_A" in name or "hra" in name else 0.02
                p.add_(torch.randn(p.shape, generator=generator) * std)
    wrapped.save_pretrained(folder)


def save_delta(base: Path, kind: str, folder: Path, generator: torch.Generator) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    made = {
        name: (DELTAS[kind](module.out_features, module.in_features, generator),)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }
    write_delta(folder, made, kind=kind, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", default="llama-160m")
    args = parser.parse_args()
    for name in args.only.split(","):
        make_kinds(args.models, name)
        print(f"wrote {len(KINDS)} adapters to {args.models / f'{name}-kinds'}")


if __name__ == "__main__":
    main()
