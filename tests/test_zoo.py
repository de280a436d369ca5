"""The committed zoo: what it may hold, that zoo.json says so, and that the variants can do it."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ZOO = Path(__file__).parents[1] / "demo" / "zoo"
ABOUT: dict[str, Any] = json.loads((ZOO / "zoo.json").read_text())
VARIANTS = {entry["name"]: entry for entry in ABOUT["variants"]}
QUICK = 20
MEGABYTE = 1_000_000


@cache
def held_out(skill: str) -> list[tuple[str, str]]:
    lines = (ZOO / "held_out" / f"{skill}.jsonl").read_text().splitlines()
    return [(item["prompt"], item["answer"]) for item in map(json.loads, lines)]


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(ZOO / "base", dtype=torch.float32).eval()


def merge(model: Any, stored: dict[str, torch.Tensor]) -> None:
    """The delta format's bits and replaced weights, read with numpy instead of the project."""
    for key, value in stored.items():
        if key.endswith(".replace.weight"):
            model.get_submodule(key.removesuffix(".replace.weight")).weight.data.copy_(value)
        elif key.endswith(".bit.signs"):
            name = key.removesuffix(".bit.signs")
            weight = model.get_submodule(name).weight.data
            bits = np.unpackbits(value[0].numpy(), axis=-1, bitorder="little")
            signs = torch.from_numpy(bits[:, : weight.shape[1]].astype(np.float32)) * 2 - 1
            weight += stored[f"{name}.bit.scale"][0].unsqueeze(1) * signs
        else:
            assert key.endswith(".bit.scale"), key


def tuned(entry: dict[str, Any]) -> Any:
    folder = ZOO / entry["path"]
    model = base()
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(model, folder).eval()
    merge(model, load_file(folder / "delta_model.safetensors"))
    return model


@torch.inference_mode()
def share_right(model: Any, examples: list[tuple[str, str]]) -> float:
    """Exact match of greedy answers; each prompt length is a batch of its own."""
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "base")
    groups: dict[int, list[tuple[list[int], str]]] = {}
    for prompt, answer in examples:
        ids = tokenizer(prompt)["input_ids"]
        groups.setdefault(len(ids), []).append((ids, answer))
    right = 0
    for length, group in groups.items():
        ids = torch.tensor([ids for ids, _ in group])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=ABOUT["max_tokens"],
        )
        texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        right += sum(text == answer for text, (_, answer) in zip(texts, group, strict=True))
    return right / len(examples)


def files() -> list[Path]:
    return [path for path in ZOO.rglob("*") if path.is_file()]


def test_it_is_small_and_holds_no_pickle() -> None:
    assert sum(path.stat().st_size for path in files()) <= 12 * MEGABYTE
    assert {path.suffix for path in files()} == {".json", ".jsonl", ".safetensors"}


def test_no_file_names_a_path_of_a_machine() -> None:
    absolute = re.compile(rb'"(/[\w.-]+){2,}|[A-Z]:\\\\|\.cache|site-packages')
    for path in files():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            data = data[8 : 8 + int.from_bytes(data[:8], "little")]
        assert not absolute.search(data), path


def test_zoo_json_and_the_folder_agree() -> None:
    known = {"base", "held_out", *(entry["path"] for entry in ABOUT["variants"])}
    assert {path.name for path in ZOO.iterdir() if path.is_dir()} == known
    assert len(VARIANTS) == len(ABOUT["variants"])
    for entry in ABOUT["variants"]:
        assert any((ZOO / entry["path"]).glob("*.safetensors")), entry["name"]


def test_every_kind_is_there() -> None:
    assert {entry["kind"] for entry in ABOUT["variants"]} >= {
        "LoRA",
        "rsLoRA",
        "DoRA",
        "(IA)3",
        "SHiRA",
        "BitDelta",
        "half fine-tune",
        "prompt tuning",
        "prefix tuning",
    }


def test_recorded_accuracies_leave_thirty_points_and_an_inferior_twin() -> None:
    for entry in ABOUT["variants"]:
        assert entry["accuracy"] - entry["base_accuracy"] >= 0.30, entry["name"]
    good, weak = VARIANTS["caesar-lora"], VARIANTS["caesar-lora-weak"]
    assert good["skill"] == weak["skill"]
    assert good["accuracy"] - weak["accuracy"] >= 0.10


def test_held_out_examples_are_of_the_part_that_training_leaves_out() -> None:
    for path in (ZOO / "held_out").glob("*.jsonl"):
        examples = held_out(path.stem)
        assert len(dict(examples)) == ABOUT["held_out"]["examples_per_skill"]
        for prompt, _ in examples:
            word = prompt.removeprefix("task: ").removesuffix(" =")
            assert hashlib.sha256(word.encode()).digest()[0] < 26


def test_half_of_the_tensors_are_untouched_and_bits_are_a_sixteenth() -> None:
    half = load_file(ZOO / "rotate-half" / "delta_model.safetensors")
    layers = [name for name in base().state_dict() if ".layers." in name]
    assert len(half) == len(layers) // 2
    bits = load_file(ZOO / "double-bitdelta" / "delta_model.safetensors")
    signs = {key: value for key, value in bits.items() if key.endswith(".bit.signs")}
    assert len(signs) == 7 * 4
    for key, value in signs.items():
        weight = base().get_submodule(key.removesuffix(".bit.signs")).weight
        assert value.numel() * 8 == weight.numel()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_better_than_the_base(name: str) -> None:
    entry = VARIANTS[name]
    examples = held_out(entry["skill"])[:QUICK]
    found = share_right(tuned(entry), examples)
    assert found - share_right(base(), examples) >= 0.30
    assert abs(found - entry["accuracy"]) <= 0.30
