"""Variants that PEFT trains and saves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from base import load
from peft import get_peft_model
from training import batches, pairs, train
from variants import Variant

BASE_NAME = "demo/zoo/base"


def build(variant: Variant, base: Path, folder: Path) -> int:
    """Train on the plain prompt and write PEFT's own files; the number of steps."""
    assert variant.peft is not None
    model, tokenizer = load(base)
    torch.manual_seed(1)
    tuned = get_peft_model(model, variant.peft())
    tuned.peft_config["default"].base_model_name_or_path = BASE_NAME
    data = batches(pairs(variant.skill, 2), tokenizer)
    steps = train(
        tuned,
        data,
        steps=variant.steps,
        lr=variant.lr,
        label=variant.name,
        until=variant.until,
    )
    tuned.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    _sort_targets(folder / "adapter_config.json")
    return steps


def _sort_targets(path: Path) -> None:
    """PEFT writes a set in the order of its hashes; sorted, a rebuild gives the same file."""
    config = json.loads(path.read_text())
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
