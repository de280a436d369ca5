"""Whatever a folder holds, it is loaded or refused with an AdapterError; and modules are chosen
as PEFT chooses them, for any config."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from deltaserve.adapters.delta_file import write_delta
from deltaserve.adapters.errors import AdapterError
from deltaserve.adapters.formats.peft.targets import Patterns, Targets
from deltaserve.adapters.load import load
from deltaserve.kernels.primitives import PromptEmbeddings

from . import test_bitdelta, test_delta_format, tiny

DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3, 1 << 40, 0.5, 1e29, "", "q_proj", ".*", "(", "all", "pissa",
    "olora", "all-linear", [], ["q_proj"], [0], [1, 1], [None], {}, {"q_proj": 1}, {"q_proj": "x"},
    {"(": 2}, {"embed_tokens": [0, 99]}, {"lm_head": []},
]  # fmt: skip


def peft(config: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model = get_peft_model(tiny.qwen2(), config)
        tiny.randomize(model, "default")
        model.save_pretrained(str(folder))

    return make


def bitdelta(folder: Path) -> None:
    tensors = test_bitdelta.published(test_bitdelta.build(), test_bitdelta.build(1))
    save_file(tensors, folder / "diff.safetensors")


def delta(folder: Path) -> None:
    prompt = PromptEmbeddings(torch.ones(2, 24))
    write_delta(folder, test_delta_format.everything(), kind="x", prefix=prompt)


MAKERS: dict[str, Callable[[Path], None]] = {
    "lora": peft(
        LoraConfig(
            r=2,
            target_modules=["q_proj", "embed_tokens"],
            modules_to_save=["norm"],
            task_type="CAUSAL_LM",
            bias="all",
        )
    ),
    "dora": peft(
        LoraConfig(
            r=2,
            target_modules=["k_proj"],
            use_dora=True,
            trainable_token_indices=[3, 4],
            task_type="CAUSAL_LM",
        )
    ),
    "ia3": peft(IA3Config(task_type="CAUSAL_LM")),
    "shira": peft(ShiraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    "prompt": peft(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prefix": peft(PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "bitdelta": bitdelta,
    "delta": delta,
}


def damage_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    match rng.randrange(7):
        case 0:
            return
        case 1:
            tensors[name] = value.to(rng.choice(DTYPES))
        case 2:
            shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
            tensors[name] = torch.zeros(shape, dtype=value.dtype)
        case 3:
            tensors[name] = value.flatten()[: rng.randrange(9)].clone()
        case 4:
            tensors[name] = torch.full_like(value, rng.choice([-1, 1, 7, 100]))
        case 5:
            parts = name.split(".")
            parts.pop(rng.randrange(len(parts)))
            tensors[".".join(parts)] = value
        case 6:
            other = rng.choice(sorted(tensors) or [name])
            tensors[other] = value.clone()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_adapters(kind: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path)
    base = tiny.spec_of(test_bitdelta.build() if kind == "bitdelta" else tiny.qwen2())
    if kind == "delta":
        base = tiny.spec_of(tiny.llama())
    (tensor_file,) = tmp_path.glob("*.safetensors")
    (config_file,) = [*tmp_path.glob("*_config.json")] or [tmp_path / "none.json"]
    whole = load_file(tensor_file)
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    load(tmp_path, base)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    refused = 0
    for _ in range(80):
        tensors, changed = dict(whole), dict(config)
        if config and rng.random() < 0.5:
            changed[rng.choice(sorted(config))] = rng.choice(VALUES)
        else:
            damage_tensors(rng, tensors)
        save_file(tensors, tensor_file)
        if config:
            config_file.write_text(json.dumps(changed))
        try:
            load(tmp_path, base)
        except AdapterError as error:
            assert str(error)
            refused += 1
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert refused > 10, "most damage should be noticed"


NAMES = st.sampled_from(
    ["q_proj", "self_attn.q_proj", "layers.1.mlp", "mlp", "up_proj", "proj", "1.mlp.up_proj", "lm"]
)
PATTERN = st.sampled_from(
    [r".*proj", "q_proj", r".*\.(q|up)_proj", r"model\.layers\.[01]\..*", r"", r".*layers.*"]
)
MODULES = [
    f"model.layers.{i}.{part}"
    for i in (0, 1, 12)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp", "mlp.experts.1.up_proj")
] + ["lm_head", "q_proj", "model.q_proj", "layers.1.q_proj", "h.3.mlp.up_proj"]


@settings(max_examples=200, deadline=None)
@given(
    target=PATTERN | st.lists(NAMES, max_size=3),
    exclude=st.none() | PATTERN | st.lists(NAMES, max_size=2),
    saved=st.none() | st.lists(NAMES, max_size=2),
    layers=st.none() | st.integers(0, 3) | st.lists(st.integers(0, 13), max_size=3),
    layers_pattern=st.none() | st.sampled_from(["layers", "h", "", ["h", "layers"], [], "experts"]),
)
def test_modules_are_chosen_as_peft_does(
    target: Any, exclude: Any, saved: Any, layers: Any, layers_pattern: Any
) -> None:
    fields = dict(
        target_modules=target,
        exclude_modules=exclude,
        modules_to_save=saved,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
    )
    theirs = SimpleNamespace(**fields, target_parameters=None)
    ours = Targets.of(fields, Patterns())
    for module in MODULES:
        assert ours.contains(module) == bool(check_target_module_exists(theirs, module)), module


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(NAMES | PATTERN | st.just("^model"), max_size=4))
def test_pattern_keys_are_chosen_as_peft_does(keys: list[str]) -> None:
    for module in MODULES:
        found = Patterns().key_of(keys, module)
        assert (module if found is None else found) == get_pattern_key(keys, module)
