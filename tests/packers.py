"""Quantized checkpoints of small models, packed bit by bit from the formats' definitions.

Written without a look at what reads them: every number is put where the format says, one field at
a time, and the float weight that it stands for is computed from the same numbers in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Pack = Callable[[str, Tensor, torch.Generator], tuple[Tensors, Tensor]]
"""(module, its weight [out, in], randomness) -> (tensors by what follows the module's path, the
float weight that they stand for)."""


def stream(values: Any, bits: int) -> Any:
    """Whole numbers -> int32 words: value i at bits `i * bits` and up of one long number."""
    number = 0
    for i, value in enumerate(values):
        assert 0 <= int(value) < 1 << bits
        number |= int(value) << (i * bits)
    words = -(-len(values) * bits // 32)
    return np.frombuffer(number.to_bytes(4 * words, "little"), dtype="<i4").copy()


def rows(values: Any, bits: int) -> Tensor:
    """[n, m] -> int32 [n, words], each row a stream."""
    return torch.from_numpy(np.stack([stream(row, bits) for row in np.asarray(values)]))


@dataclass
class Rounded:
    """q [out, in]; scale, zero [out, groups]; group [in]: which group an input is of."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor

    def weight(self) -> Tensor:
        """float32 [out, in], rounded once."""
        scale, zero = self.scale.double()[:, self.group], self.zero.double()[:, self.group]
        return ((self.q.double() - zero) * scale).float()


def rounded(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    generator: torch.Generator,
    order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Rounded:
    """Round to nearest, scales as `dtype` holds them. order: inputs of a group lie anywhere."""
    out, inner = weight.shape
    size = inner if group_size == -1 else group_size
    group = torch.arange(inner) // size
    if order:
        group = group[torch.randperm(inner, generator=generator)]
    groups, top = -(-inner // size), (1 << bits) - 1
    scale, zero = torch.zeros(out, groups), torch.zeros(out, groups)
    q = torch.zeros(out, inner, dtype=torch.long)
    for g in range(groups):
        own = group == g
        part = weight[:, own]
        if symmetric:
            scale[:, g] = (2 * part.abs().amax(1) / top).to(dtype).float()
            zero[:, g] = (top + 1) // 2
        else:
            low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
            scale[:, g] = ((high - low) / top).to(dtype).float()
            zero[:, g] = (-low / scale[:, g]).round().clamp(1, top)
        q[:, own] = (part / scale[:, g, None] + zero[:, g, None]).round().clamp(0, top).long()
    return Rounded(q, scale, zero, group)


def gptq(
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    order: bool = False,
    v2: bool = False,
) -> Pack:
    def pack(module: str, weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        r = rounded(weight, bits, group_size, symmetric=symmetric, generator=generator, order=order)
        stored = r.zero.long().T - (0 if v2 else 1)
        return {
            "qweight": rows(r.q, bits).T.contiguous(),
            "qzeros": rows(stored, bits),
            "scales": r.scale.T.contiguous().half(),
            "g_idx": r.group.int(),
        }, r.weight()

    return pack


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(group_size: int, *, version: str = "gemm") -> Pack:
    """Asymmetric, 4 bits. gemv: scales and zeros padded as AutoAWQ pads them."""

    def reordered(values: Tensor) -> Tensor:
        return values.view(len(values), -1, 8)[:, :, AWQ_ORDER].flatten(1)

    def pack(module: str, weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        r = rounded(weight, 4, group_size, symmetric=False, generator=generator)
        zero = r.zero.long()
        if version == "gemm":
            return {
                "qweight": rows(reordered(r.q.T), 4),
                "qzeros": rows(reordered(zero.T), 4),
                "scales": r.scale.T.contiguous().half(),
            }, r.weight()
        step = {32: 4, 64: 2}.get(group_size, 1)
        words = step * -(-zero.shape[1] // (8 * step))
        wide = torch.zeros(len(zero), words * 8)
        wide[:, : zero.shape[1]] = r.scale
        padded = torch.zeros(len(zero), words * 8, dtype=torch.long)
        padded[:, : zero.shape[1]] = zero
        return {
            "qweight": rows(r.q, 4),
            "qzeros": rows(padded, 4),
            "scales": wide.half(),
        }, r.weight()

    return pack


def compressed(
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Pack:
    """compressed-tensors' pack-quantized: signed values, stored plus half their range."""

    def pack(module: str, weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        r = rounded(
            weight,
            bits,
            group_size,
            symmetric=symmetric,
            generator=generator,
            order=order,
            dtype=dtype,
        )
        parts = {
            "weight_packed": rows(r.q, bits),
            "weight_shape": torch.tensor(weight.shape),
            "weight_scale": r.scale.to(dtype),
        }
        if not symmetric:
            parts["weight_zero_point"] = rows(r.zero.long().T, bits).T.contiguous()
        if order:
            parts["weight_g_idx"] = r.group.int()
        return parts, r.weight()

    return pack


def int8(strategy: str, *, symmetric: bool = True, group_size: int = 32) -> Pack:
    """compressed-tensors' int-quantized."""

    def pack(module: str, weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        size = group_size if strategy == "group" else -1
        flat = weight.reshape(1, -1) if strategy == "tensor" else weight
        r = rounded(flat, 8, size, symmetric=symmetric, generator=generator, dtype=torch.bfloat16)
        parts = {
            "weight": (r.q - 128).to(torch.int8).view(weight.shape),
            "weight_scale": r.scale.bfloat16(),
        }
        if not symmetric:
            parts["weight_zero_point"] = (r.zero - 128).to(torch.int8)
        if strategy == "tensor":
            parts |= {k: v.reshape(1) for k, v in parts.items() if k != "weight"}
        return parts, r.weight().view(weight.shape)

    return pack


def fp8(strategy: str, *, name: str = "weight_scale", block: tuple[int, int] = (128, 128)) -> Pack:
    """Scales of the strategies "tensor", "scalar", "row", "channel" (rows as [out, 1]), "block"."""

    def pack(module: str, weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        out, inner = weight.shape
        height, width = {
            "tensor": (out, inner),
            "scalar": (out, inner),
            "row": (1, inner),
            "channel": (1, inner),
            "block": block,
        }[strategy]
        scale = torch.zeros(-(-out // height), -(-inner // width))
        q = torch.zeros(out, inner, dtype=torch.uint8)
        dense = torch.zeros(out, inner)
        for i in range(len(scale)):
            for j in range(scale.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scale[i, j] = weight[at].abs().max() / 448
                bytes_ = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
                q[at] = bytes_.view(torch.uint8)
                dense[at] = (bytes_.double() * scale[i, j].double()).float()
        shapes = {"tensor": (1,), "scalar": (), "row": (out,)}
        parts = {
            "weight": q.view(torch.float8_e4m3fn),
            name: scale.reshape(shapes.get(strategy, scale.shape)),
            "input_scale": torch.tensor(0.5),
        }
        return parts, dense

    return pack


# The table of QLoRA's appendix E, and bitsandbytes' FP4 in the order of its bits.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def bnb4(kind: str, *, block: int = 64, double: bool = False) -> Pack:
    """bitsandbytes' 4 bits. double: the scales in 8 bits, of blocks of 256 of them."""

    def pack(module: str, weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        code = torch.tensor({"nf4": NF4, "fp4": FP4}[kind])
        flat = weight.reshape(-1)
        count = -(-len(flat) // block)
        absmax = torch.stack([flat[i * block :][:block].abs().max() for i in range(count)])
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": block,
            "dtype": "bfloat16",
            "shape": list(weight.shape),
        }
        parts: Tensors = {}
        if double:
            table = torch.linspace(-1, 1, 256)
            offset = float(absmax.mean())
            top = torch.stack(
                [(absmax[i:][:256] - offset).abs().max() for i in range(0, count, 256)]
            )
            codes = [
                int((table - (absmax[i] - offset) / top[i // 256]).abs().argmin())
                for i in range(count)
            ]
            absmax = torch.stack([table[c] * top[i // 256] for i, c in enumerate(codes)])
            absmax = absmax + torch.tensor(offset)
            parts = {
                "weight.absmax": torch.tensor(codes, dtype=torch.uint8),
                "weight.nested_absmax": top,
                "weight.nested_quant_map": table,
            }
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            parts = {"weight.absmax": absmax}
        scale = absmax[torch.arange(len(flat)) // block]
        q = ((flat / scale)[:, None] - code).abs().argmin(1)
        pairs = torch.cat((q, torch.zeros(len(q) % 2, dtype=torch.long))).view(-1, 2)
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return parts | {
            "weight": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None],
            "weight.quant_map": code,
            f"weight.quant_state.bitsandbytes__{kind}": text,
        }, (code.double()[q] * scale.double()).float().view(weight.shape)

    return pack


def bnb8() -> Pack:
    """bitsandbytes' int8: rows, with their largest absolute values."""

    def pack(module: str, weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        top = weight.abs().amax(1)
        q = (weight * 127 / top[:, None]).round().to(torch.int8)
        dense = q.double() * top.double()[:, None] / 127
        layout = torch.tensor(0, dtype=torch.uint8)
        return {"weight": q, "SCB": top, "weight_format": layout}, dense.float()

    return pack


def write(
    source: Path,
    packed: Path,
    plain: Path,
    pack: Pack,
    config: dict[str, Any],
    *,
    skip: Iterable[str] = ("lm_head",),
    seed: int = 0,
) -> None:
    """From the checkpoint in `source` a quantized one in `packed` and, in `plain`, one of the float
    weights that it stands for. skip: ends of the names of linears that are left alone."""
    generator = torch.Generator().manual_seed(seed)
    for folder in (packed, plain):
        shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    held, floats = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        linear = tensor.dim() == 2 and module != name and "embed" not in name
        if not linear or module.endswith(tuple(skip)):
            continue
        parts, weight = pack(module, tensor.float(), generator)
        del held[name]
        held |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        floats[name] = weight
    save_file(held, packed / "model.safetensors", {"format": "pt"})
    save_file(floats, plain / "model.safetensors", {"format": "pt"})
    edit(packed, lambda c: c.update(quantization_config=config))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
