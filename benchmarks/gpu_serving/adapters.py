"""Adapters of random numbers, written as files: PEFT's own format for LoRA, and the delta format
for what the kinds of kinds.py become once they are lowered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from gpu_kernels.data import DEVICE
from safetensors.torch import save_file
from torch import Tensor

from deltaserve.adapters.delta_file import CONFIG_FILE, PRIMITIVES, TENSOR_FILE, config_text
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    LowRank,
    Primitive,
    Replace,
    Scale,
    SparseCsr,
    SparseRows,
)
from gpu_serving.sizes import Shape

VIRTUAL = 16
"""Virtual tokens of a prompt and of a prefix."""
ROWS = 16
SPARSE = 0.01
Make = Callable[[int, int, "Random"], tuple[Primitive, ...]]


class Random:
    """Numbers of one seed, made on the device, in host memory."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        self.dtype = getattr(torch, dtype)

    def normal(self, *shape: int, std: float) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=DEVICE) * std
        return drawn.to(self.dtype).cpu()

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator, device=DEVICE)
        return drawn.to(dtype).cpu()


def lora(folder: Path, shape: Shape, rank: int, seed: int) -> Path:
    """All linears, as PEFT saves it."""
    file = folder / "adapter_model.safetensors"
    if file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name.rpartition(".")[2] for name in shape.linears()})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": names,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random, tensors = Random(seed, shape.dtype), dict[str, Tensor]()
    for name, (out, inner) in shape.modules().items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = random.normal(rank, inner, std=inner**-0.5)
        tensors[f"{stem}.lora_B.weight"] = random.normal(out, rank, std=0.02)
    _save(tensors, file)
    return folder


@dataclass(frozen=True)
class Kind:
    """name: as in kinds.py. make: primitives of a linear (out, in), on the linears whose last name
    is in `only`, or on all. prefix: its virtual tokens. norms: it tunes those instead."""

    name: str
    make: Make | None = None
    only: tuple[str, ...] = ()
    prefix: Callable[[Shape, Random], dict[str, Tensor]] | None = None
    norms: bool = False


def delta(folder: Path, shape: Shape, kind: Kind, seed: int) -> Path:
    """One adapter of a kind in the delta format."""
    file = folder / TENSOR_FILE
    if file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config_text(kind.name, "", "", "", {}, {}))
    random, tensors = Random(seed, shape.dtype), dict[str, Tensor]()
    for module, (out, inner) in shape.modules().items():
        if kind.make and (not kind.only or module.rpartition(".")[2] in kind.only):
            tensors |= _named(module, kind.make(out, inner, random))
    if kind.norms:
        hidden = shape.config["hidden_size"]
        for i in range(shape.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                gain = 1 + random.normal(hidden, std=0.02)
                tensors |= _named(f"model.layers.{i}.{norm}", (Replace(gain),))
    if kind.prefix:
        tensors |= kind.prefix(shape, random)
    _save(tensors, file)
    return folder


def _named(module: str, primitives: tuple[Primitive, ...]) -> dict[str, Tensor]:
    """Tensors by their names in a delta file."""
    names = {cls: name for name, cls in PRIMITIVES.items()}
    found: dict[str, Tensor] = {}
    for primitive in primitives:
        for field in fields(primitive):
            value = getattr(primitive, field.name)
            if isinstance(value, Tensor):
                found[f"{module}.{names[type(primitive)]}.{field.name}"] = value
    return found


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Under another name until it is whole."""
    part = file.with_suffix(".part")
    save_file(tensors, part)
    part.rename(file)


def low_rank(rank: int) -> Make:
    def make(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
        a = random.normal(rank, inner, std=inner**-0.5)
        return (LowRank(a, random.normal(out, rank, std=0.02)),)

    return make


def scaled_low_rank(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    return (*low_rank(16)(out, inner, random), factors(out, inner, random)[0])


def biased_low_rank(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    return (*low_rank(16)(out, inner, random), Bias(random.normal(out, std=0.02)))


def factors(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    """Of the outputs."""
    return (Scale(None, 1 + random.normal(out, std=0.02)),)


def input_factors(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    return (Scale(1 + random.normal(inner, std=0.02), None),)


def ia3(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    """Inputs of down_proj, which has more of them than outputs; outputs of the others."""
    return (input_factors if inner > out else factors)(out, inner, random)


def bits(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    signs = random.integers(0, 256, 1, out, inner // 8, dtype=torch.uint8)
    return (Bit(signs, torch.full((1, out), 0.02 * inner**-0.5)),)


def sparse(density: float) -> Make:
    """As many in each row, one in each stretch: sorted and unique."""

    def make(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
        row = max(1, int(density * inner))
        spread = inner // row
        picked = random.integers(0, spread, out, row, dtype=torch.int32)
        columns = picked + torch.arange(row, dtype=torch.int32) * spread
        values = random.normal(out * row, std=0.05)
        return (SparseCsr(torch.arange(out + 1) * row, columns.flatten(), values),)

    return make


def shira(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    """As many numbers as a LoRA of rank 16 has."""
    return sparse(16 * (out + inner) / (out * inner))(out, inner, random)


def rows(out: int, inner: int, random: Random) -> tuple[Primitive, ...]:
    index = torch.arange(ROWS) * (out // ROWS)
    return (SparseRows(index, random.normal(ROWS, inner, std=0.2 * inner**-0.5)),)


def prompt(shape: Shape, random: Random) -> dict[str, Tensor]:
    return {"prompt.embeddings": random.normal(VIRTUAL, shape.config["hidden_size"], std=1.0)}


def prefix(shape: Shape, random: Random) -> dict[str, Tensor]:
    size = (VIRTUAL, shape.config["num_key_value_heads"], shape.config["head_dim"])
    return {
        f"prefix.{what}.{i}": random.normal(*size, std=1.0)
        for i in range(shape.layers)
        for what in ("keys", "values")
    }


BITDELTA = Kind("bitdelta", bits)
KINDS = (
    Kind("lora", low_rank(16)),
    Kind("rslora", low_rank(16)),
    Kind("dora", scaled_low_rank),
    Kind("lora-bias", biased_low_rank),
    Kind("adalora", low_rank(8)),
    Kind("vera", low_rank(256)),
    Kind("loha", low_rank(16)),
    Kind("hra", low_rank(8)),
    Kind("shira", shira),
    Kind("ia3", ia3, only=("k_proj", "v_proj", "down_proj")),
    Kind("ln-tuning", norms=True),
    Kind("prompt-tuning", prefix=prompt),
    Kind("prefix-tuning", prefix=prefix),
    BITDELTA,
    Kind("sparse", sparse(SPARSE)),
    Kind("sparse-rows", rows),
)
"""Those of kinds.py, as they are once lowered (a LoHa of rank 4 is of rank 16 then)."""
