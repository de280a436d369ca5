"""GPTQ checkpoints: what is held is what they stand for, and what is refused says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packers
import pytest
import torch
from quantized import UP, check_weights, kinds
from quantized import made as checkpoint
from variants import make_base

from deltaserve.kernels.base import PermutedLinear
from deltaserve.server.model import MalformedModel, UnsupportedModel, load

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def made(tmp_path: Path, pack: packers.Pack, arch: str = "llama", **config: Any) -> Path:
    return checkpoint(tmp_path, pack, {**CONFIG, **config}, arch)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(4, 32), (4, 40), (4, -1), (2, 16), (3, 32), (8, 32)]
)
def test_weights(tmp_path: Path, bits: int, group_size: int, symmetric: bool, v2: bool) -> None:
    pack = packers.gptq(bits, group_size, symmetric=symmetric, v2=v2)
    stored = "gptq_v2" if v2 else "gptq"
    folder = made(tmp_path, pack, bits=bits, group_size=group_size, checkpoint_format=stored)
    model = check_weights(folder)
    end = "channel" if group_size == -1 else f"g{group_size}"
    assert model.spec.quantization == f"gptq-int{bits}-{end}"
    assert kinds(model) == {"ByteLinear" if bits == 8 else "Int4Linear"}


def test_activation_order(tmp_path: Path) -> None:
    model = check_weights(made(tmp_path, packers.gptq(4, 32, order=True), desc_act=True))
    groups = model.modules.group_of
    q, k = (groups[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert isinstance(q.base, PermutedLinear) and q is not k


def test_one_order_of_siblings_is_one_linear(tmp_path: Path) -> None:
    """Calibrated together, as GPTQ does, q, k and v have the same order."""
    inner = packers.gptq(4, 32, order=True)

    def pack(module: str, weight: torch.Tensor, generator: torch.Generator) -> Any:
        return inner(module, weight, torch.Generator().manual_seed(weight.shape[1]))

    model = check_weights(made(tmp_path, pack, arch="qwen2", desc_act=True))
    group = model.modules.group_of["model.layers.0.self_attn.q_proj"]
    assert len(group.names) == 3 and isinstance(group.base, PermutedLinear)
    assert group.base.bias is not None
    assert group.base.nbytes > group.base.inner.nbytes


def test_fields_per_module(tmp_path: Path) -> None:
    by_layer = {True: packers.gptq(4, 32), False: packers.gptq(2, 16)}

    def pack(module: str, weight: torch.Tensor, generator: torch.Generator) -> Any:
        return by_layer["layers.0" in module](module, weight, generator)

    dynamic = {
        r"-:.*\.layers\.0\.mlp\.down_proj": {},
        r"+:.*\.layers\.1\.": {"bits": 2, "group_size": 16},
        r".*\.layers\.1\.": {"bits": 3},
    }
    make_base(tmp_path / "base", "llama")
    folder = tmp_path / "packed"
    packers.write(
        tmp_path / "base",
        folder,
        tmp_path / "plain",
        pack,
        {**CONFIG, "dynamic": dynamic},
        skip=("lm_head", "0.mlp.down_proj"),
    )
    model = check_weights(folder)
    base = model.modules.group_of["model.layers.0.mlp.down_proj"].base
    assert type(base).__name__ == "DenseLinear"


def test_zeros_that_borrow(tmp_path: Path) -> None:
    """GPTQModel takes ones off whole words; only its own checkpoints can be read so."""
    inner = packers.gptq(4, 32, symmetric=False, v2=True)

    def pack(module: str, weight: torch.Tensor, generator: torch.Generator) -> Any:
        parts, _ = inner(module, weight.abs(), generator)
        zeros = parts["qzeros"].long()
        assert bool(((zeros & 15) == 1).any())
        parts["qzeros"] = (zeros - 0x11111111 - 1).to(torch.int32)
        r = packers.rounded(weight.abs(), 4, 32, symmetric=False, generator=generator)
        r.zero[::8] -= 1
        return parts, r.weight()

    folder = made(tmp_path, pack, sym=False, meta={"quantizer": ["gptqmodel:1.0"]})
    check_weights(folder)
    packers.edit(folder, lambda c: c["quantization_config"].pop("meta"))
    with pytest.raises(UnsupportedModel, match=r"qzeros holds 15 .*gptq_v2"):
        load(folder, dtype=torch.float32)


def test_biases_of_zeros(tmp_path: Path) -> None:
    """AutoGPTQ writes them for linears that have none."""
    folder = made(tmp_path, packers.gptq(4, 32))
    packers.edit_tensors(folder, lambda t: t.update({f"{UP}.bias": torch.zeros(96)}))
    load(folder, dtype=torch.float32)
    packers.edit_tensors(folder, lambda t: t[f"{UP}.bias"].fill_(0.5))
    with pytest.raises(MalformedModel, match=r"up_proj\.bias is not zero"):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5),
        ("bits", None),
        ("group_size", 12),
        ("group_size", "128"),
        ("desc_act", "yes"),
        ("checkpoint_format", "marlin"),
        ("format", "gptq_p"),
        ("is_marlin_format", True),
        ("pack_dtype", "int64"),
        ("dynamic", {"+:.*": {"bits": 5}}),
        ("dynamic", {"+:.*": {"rotation": "hadamard"}}),
        ("dynamic", {"+:(": {}}),
        ("rotation", "hadamard"),
        ("activation", "w4afp8"),
        ("quant_method", "aqlm"),
    ],
)
def test_refused_fields(tmp_path: Path, field: str, value: Any) -> None:
    folder = made(tmp_path, packers.gptq(4, 32), **{field: value})
    with pytest.raises(UnsupportedModel, match=rf"quantization_config.*{field}"):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.scales"), r"up_proj\.scales is missing"),
        (lambda t: t.pop(f"{UP}.qzeros"), r"up_proj\.qzeros is missing"),
        (lambda t: t.pop(f"{UP}.qweight"), r"up_proj"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(96, 64)}), r"up_proj has both"),
        (
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1]}),
            r"scales has shape \(1, 96\)",
        ),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:4]}), r"qweight has shape"),
        (
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}),
            r"qweight is torch.flo",
        ),
        (
            lambda t: t[f"{UP}.scales"].view(-1)[3].fill_(torch.nan),
            r"scales has values that are no",
        ),
        (
            lambda t: t[f"{UP}.scales"].view(-1)[3].fill_(torch.inf),
            r"scales has values that are no",
        ),
        (lambda t: t[f"{UP}.g_idx"][5].fill_(2), r"g_idx has values in 0\.\.2"),
        (lambda t: t[f"{UP}.g_idx"][5].fill_(-1), r"g_idx has values in -1\.\.1"),
        (lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].flip(0)}), r"g_idx is not in order"),
    ],
)
def test_broken_files(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    folder = made(tmp_path, packers.gptq(4, 32))
    packers.edit_tensors(folder, change)
    with pytest.raises((MalformedModel, UnsupportedModel), match=message):
        load(folder, dtype=torch.float32)


def test_groups_of_other_sizes(tmp_path: Path) -> None:
    folder = made(tmp_path, packers.gptq(4, 32, order=True), desc_act=True)

    def move(tensors: packers.Tensors) -> None:
        index = tensors[f"{UP}.g_idx"]
        index[(index == 0).nonzero()[0]] = 1

    packers.edit_tensors(folder, move)
    with pytest.raises(UnsupportedModel, match=r"g_idx has groups that are not of 32 inputs"):
        load(folder, dtype=torch.float32)


def test_a_tied_head(tmp_path: Path) -> None:
    folder = made(tmp_path, packers.gptq(4, 32), arch="llama-tied-biased")
    load(folder, dtype=torch.float32)

    def add_head(tensors: packers.Tensors) -> None:
        parts, _ = packers.gptq(4, 32)("lm_head", torch.randn(288, 64), torch.Generator())
        tensors |= {f"lm_head.{part}": value for part, value in parts.items()}

    packers.edit_tensors(folder, add_head)
    with pytest.raises(UnsupportedModel, match="lm_head is quantized, but config"):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantizing_again_is_refused(tmp_path: Path, quantize: Any) -> None:
    folder = made(tmp_path, packers.gptq(4, 32))
    with pytest.raises(UnsupportedModel, match=f"--quantize {quantize}: .*gptq-int4-g32"):
        load(folder, dtype=torch.float32, quantize=quantize)


def test_fingerprints(tmp_path: Path) -> None:
    folder = made(tmp_path, packers.gptq(4, 32))
    one, two = (load(folder, dtype=torch.float32).spec for _ in range(2))
    assert (one.fingerprint, one.held_fingerprint) == (two.fingerprint, two.held_fingerprint)
    packers.edit_tensors(folder, lambda t: t[f"{UP}.qweight"].view(-1)[0].add_(1))
    other = load(folder, dtype=torch.float32).spec
    assert one.fingerprint != other.fingerprint
    assert one.held_fingerprint != other.held_fingerprint
