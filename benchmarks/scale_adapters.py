"""Thousands of adapters as people register them: rank 8 on q_proj and v_proj in bfloat16, the LoRA
paper's choice and PEFT's default for Llama; 0.6 MB each at 160 M parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

RANK = 8
TARGETS = ("q_proj", "v_proj")
STEP = 64
"""Numbers by which the weights of one are shifted against those of the next."""


def shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Of the tensors, by PEFT's names."""
    config = json.loads((base / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    outputs = {
        "q_proj": config["num_attention_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    found = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            found[f"{name}.lora_A.weight"] = (RANK, hidden)
            found[f"{name}.lora_B.weight"] = (outputs[target], RANK)
    return found


def write_adapters(base: Path, folder: Path, count: int) -> list[Path]:
    """So many folders, no two with the same weights: windows into one row of random numbers."""
    header, at = dict[str, object](), 0
    for name, shape in shapes(base).items():
        end = at + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    need = at + 2 * STEP * count
    free = shutil.disk_usage(folder).free
    if free < count * (at + len(head)) + (1 << 30):
        raise SystemExit(f"{folder}: {count} adapters take {count * at >> 20} MiB; give --counts")
    numbers = np.random.default_rng(1).standard_normal(need // 2, dtype=np.float32) * 0.03
    pool = memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    made = []
    for i in range(count):
        made.append(folder / f"a{i:05}")
        made[-1].mkdir()
        (made[-1] / "adapter_config.json").write_text(json.dumps(config))
        with (made[-1] / "adapter_model.safetensors").open("wb") as f:
            f.write(head)
            f.write(pool[2 * STEP * i : 2 * STEP * i + at])
    return made
