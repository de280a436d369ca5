"""AWQ, compressed-tensors and FP8 checkpoints: what is held is what they stand for, and what is
refused says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packers
import pytest
import torch
from packers import Tensors
from quantized import UP, check_weights, kinds, made

from deltaserve.server.model import MalformedModel, UnsupportedModel, load

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "none"}


def ct(
    format: str = "pack-quantized", *, group: dict[str, Any] | None = None, **weights: Any
) -> dict[str, Any]:
    given = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    one = {"targets": ["Linear"], "weights": given, **(group or {})}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": one},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("group_size", [32, 40, -1])
def test_awq(tmp_path: Path, group_size: int, version: str) -> None:
    config = {**AWQ, "group_size": group_size, "version": version.upper()}
    model = check_weights(made(tmp_path, packers.awq(group_size, version=version), config))
    assert kinds(model) == {"Int4Linear"}
    end = "channel" if group_size == -1 else f"g{group_size}"
    assert model.spec.quantization == f"awq-int4-{end}"


def test_awq_in_its_own_words(tmp_path: Path) -> None:
    """AutoAWQ's own names of the fields."""
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "backend": "autoawq"}
    assert kinds(check_weights(made(tmp_path, packers.awq(32), config))) == {"Int4Linear"}


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 40), (4, -1), (8, 32), (8, -1)])
def test_packed(tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    strategy = {"strategy": "group", "group_size": group_size} if group_size > 0 else {}
    config = ct(num_bits=bits, symmetric=symmetric, **strategy)
    pack = packers.compressed(bits, group_size, symmetric=symmetric)
    model = check_weights(made(tmp_path, pack, config))
    rows = bits == 8 and group_size == -1 and symmetric
    bytes_ = "Int8Linear" if rows else "ByteLinear"
    assert kinds(model) == {bytes_ if bits == 8 else "Int4Linear"}
    end = f"-g{group_size}" if group_size > 0 else ""
    assert model.spec.quantization == f"compressed-tensors-int{bits}{end}"


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_in_activation_order(tmp_path: Path, bits: int) -> None:
    config = ct(num_bits=bits, strategy="group", group_size=32, actorder="group")
    pack = packers.compressed(bits, 32, order=True)
    assert kinds(check_weights(made(tmp_path, pack, config))) == {"PermutedLinear"}


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_bytes(tmp_path: Path, strategy: str, symmetric: bool) -> None:
    size = {"group_size": 32} if strategy == "group" else {}
    config = ct("int-quantized", num_bits=8, symmetric=symmetric, strategy=strategy, **size)
    model = check_weights(made(tmp_path, packers.int8(strategy, symmetric=symmetric), config))
    rows = symmetric and strategy != "group"
    assert kinds(model) == {"Int8Linear" if rows else "ByteLinear"}


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("held", ["float-quantized", "naive-quantized"])
def test_compressed_floats(tmp_path: Path, strategy: str, held: str) -> None:
    size = {"block_structure": [32, 24]} if strategy == "block" else {}
    config = ct(held, num_bits=8, type="float", strategy=strategy, **size)
    model = check_weights(made(tmp_path, packers.fp8(strategy, block=(32, 24)), config))
    assert kinds(model) == {"ByteLinear"}


def test_groups_of_one_config(tmp_path: Path) -> None:
    """Targets by name, by pattern and by class, in this order; packed and floats in one model."""
    mlp, rest = packers.compressed(4, 32), packers.fp8("channel")

    def pack(module: str, weight: torch.Tensor, generator: torch.Generator) -> Any:
        return (mlp if ".mlp." in module else rest)(module, weight, generator)

    config = ct("mixed-precision")
    int4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
    config["config_groups"] = {
        "rest": {
            "targets": ["Linear"],
            "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
        },
        "mlp": {
            "targets": [
                r"re:.*\.mlp\.(gate|up)_proj$",
                *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1)),
            ],
            "format": "pack-quantized",
            "weights": int4,
        },
    }
    model = check_weights(made(tmp_path, pack, config))
    assert kinds(model) == {"Int4Linear", "ByteLinear"}
    assert model.spec.quantization == "compressed-tensors-fp8-e4m3+int4-g32"


@pytest.mark.parametrize("strategy", ["tensor", "scalar", "row", "channel"])
def test_fp8(tmp_path: Path, strategy: str) -> None:
    model = check_weights(made(tmp_path, packers.fp8(strategy), FP8))
    assert kinds(model) == {"ByteLinear"} and model.spec.quantization == "fp8-e4m3"


@pytest.mark.parametrize("block", [(128, 128), (32, 24), (7, 64)])
def test_fp8_of_blocks(tmp_path: Path, block: tuple[int, int]) -> None:
    config = {**FP8, "weight_block_size": list(block), "fmt": "e4m3"}
    pack = packers.fp8("block", name="weight_scale_inv", block=block)
    model = check_weights(made(tmp_path, pack, config, arch="qwen2"))
    assert model.spec.quantization == f"fp8-e4m3-block{block[0]}x{block[1]}"
    group = model.modules.group_of["model.layers.0.self_attn.q_proj"]
    assert len(group.names) == 3 and group.base.bias is not None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**FP8, "activation_scheme": "static"}, "activations"),
        ({**FP8, "activation_scheme": "dynamic"}, "activations"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "activations"),
        ({**FP8, "kv_cache_scheme": "fp8"}, "keys and values"),
    ],
)
def test_what_is_computed_otherwise_is_said(
    tmp_path: Path, config: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_weights(made(tmp_path, packers.fp8("channel"), config))
    assert [r.message for r in caplog.records if said in r.message]


def test_bfloat16_scales_cost_no_more(tmp_path: Path) -> None:
    """The linears hold as much as the checkpoint, but for the rounding up to 16 rows."""
    model = load(made(tmp_path, packers.fp8("channel"), FP8), dtype=torch.bfloat16)
    base = model.modules.group_of[UP].base
    assert base.nbytes == 96 * 64 * 2 + 4 * 96 * 2  # gate and up


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 8),
        ("group_size", 4),
        ("zero_point", False),
        ("version", "marlin"),
        ("version", "gemv_fast"),
        ("format", "gemv"),
        ("backend", "llm-awq"),
        ("desc_act", True),
        ("activation", "int8"),
    ],
)
def test_refused_fields_of_awq(tmp_path: Path, field: str, value: Any) -> None:
    folder = made(tmp_path, packers.awq(32), {**AWQ, field: value})
    with pytest.raises(UnsupportedModel, match=rf"quantization_config\.{field}"):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_scheme", "block"),
        ("fmt", "e5m2"),
        ("fmt", "e4m3fnuz"),
        ("weight_block_size", [128]),
        ("weight_block_size", [0, 128]),
        ("expert_dtype", "fp4"),
        ("scale_fmt", "e5m3"),
        ("transform", "hadamard"),
    ],
)
def test_refused_fields_of_fp8(tmp_path: Path, field: str, value: Any) -> None:
    folder = made(tmp_path, packers.fp8("tensor"), {**FP8, field: value})
    with pytest.raises(UnsupportedModel, match=rf"quantization_config\.{field}"):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**ct(), "format": "nvfp4-pack-quantized"}, r"\.format is 'nvfp4"),
        ({**ct(), "format": "marlin-24"}, r"\.format is 'marlin"),
        ({**ct(), "quantization_status": "frozen"}, r"quantization_status is 'frozen'"),
        ({**ct(), "sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config"),
        ({**ct(), "transform_config": {"config_groups": {"u": {}}}}, r"transform_config"),
        ({**ct(), "config_groups": {}}, r"config_groups"),
        ({**ct(), "config_groups": {"a": {"targets": ["Linear"]}}}, r"group.*\.a\.weights"),
        ({**ct(), "surprise": 1}, r"quantization_config\.surprise"),
        (ct(num_bits=3), r"group_0\.weights\.num_bits"),
        (ct(num_bits=4, type="float"), r"group_0\.weights\.num_bits"),
        (ct(num_bits=8, type="float"), r"group_0\.weights\.type"),
        (ct(strategy="token"), r"group_0\.weights\.strategy"),
        (ct(strategy="group", group_size=12), r"group_0\.weights\.group_size"),
        (ct(strategy="block", block_structure=[16, 16]), r"weights\.block_structure"),
        (ct(dynamic=True), r"group_0\.weights\.dynamic"),
        (ct(actorder="sideways"), r"group_0\.weights\.actorder"),
        (ct(surprise=1), r"group_0\.weights\.surprise"),
        (ct(group={"surprise": 1}), r"group_0\.surprise"),
        (ct("int-quantized"), r"group_0\.weights\.num_bits"),
    ],
)
def test_refused_fields_of_compressed_tensors(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = made(tmp_path, packers.compressed(4, -1), config)
    with pytest.raises(UnsupportedModel, match=message):
        load(folder, dtype=torch.float32)


def drop(part: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def set_to(part: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"])})


def nan_at_3(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = torch.nan
    return tensor


PACKED = (
    packers.compressed(4, 32, symmetric=False, order=True),
    ct(strategy="group", group_size=32, symmetric=False, actorder="group"),
)


@pytest.mark.parametrize(
    ("made_by", "change", "message"),
    [
        ((packers.awq(32), AWQ), drop("scales"), r"up_proj\.scales is missing"),
        ((packers.awq(32), AWQ), drop("qzeros"), r"up_proj\.qzeros is missing"),
        ((packers.awq(32), AWQ), set_to("scales", nan_at_3), r"scales has values that are not fin"),
        (
            (packers.awq(32), AWQ),
            set_to("qweight", lambda t: t[:8]),
            r"qweight has shape \(8, 12\)",
        ),
        ((packers.awq(32), {**AWQ, "group_size": 64}), lambda t: None, r"qzeros has shape"),
        (PACKED, drop("weight_scale"), r"up_proj\.weight_scale is missing"),
        (PACKED, drop("weight_shape"), r"up_proj\.weight_shape is missing"),
        (PACKED, drop("weight_zero_point"), r"up_proj\.weight_zero_point is missing"),
        (PACKED, drop("weight_g_idx"), r"up_proj\.weight_g_idx is missing"),
        (PACKED, set_to("weight_g_idx", lambda t: t + 1), r"weight_g_idx has values in 1\.\.2"),
        (PACKED, set_to("weight_shape", lambda t: t + 1), r"weight_shape is \(97, 65\)"),
        (PACKED, set_to("weight_packed", lambda t: t[:4]), r"weight_packed has shape \(4, 8\)"),
        (PACKED, set_to("weight_scale", nan_at_3), r"weight_scale has values that are not fin"),
        (
            (packers.compressed(4, 32), {**ct(strategy="group", group_size=32), "ignore": [UP]}),
            lambda t: None,
            r"up_proj is packed, although quantization_config\.ignore",
        ),
        (
            (packers.compressed(4, -1), ct(group={"targets": [r"re:.*attn.*"]})),
            lambda t: None,
            r"mlp\.\w+ is packed, but no target",
        ),
        (
            (packers.compressed(4, -1), ct("int-quantized", num_bits=8)),
            lambda t: None,
            r"has weight_packed, .* not what format int-quantized holds",
        ),
        ((packers.fp8("tensor"), FP8), drop("weight_scale"), r"up_proj\.weight is of 8-bit floats"),
        ((packers.fp8("tensor"), FP8), drop("weight"), r"up_proj\.weight is missing"),
        (
            (packers.fp8("channel"), FP8),
            set_to("weight_scale", nan_at_3),
            r"weight_scale has value",
        ),
        (
            (packers.fp8("channel"), FP8),
            set_to("weight", lambda t: nan_at_3(t.float()).to(torch.float8_e4m3fn)),
            r"up_proj\.weight has values that are not numbers",
        ),
        (
            (packers.fp8("channel"), FP8),
            set_to("weight_scale", lambda t: t[:5]),
            r"weight_scale has shape \(5, 1\)",
        ),
        (
            (packers.fp8("tensor"), {**FP8, "weight_block_size": [32, 32]}),
            lambda t: None,
            r"weight_scale has shape \(1,\); it must be \(\d, \d\)",
        ),
        (
            (packers.fp8("tensor"), FP8),
            set_to("weight", lambda t: t.to(torch.float16)),
            r"up_proj\.weight is torch\.float16",
        ),
    ],
)
def test_broken_files(
    tmp_path: Path, made_by: tuple[Any, Any], change: Callable[[Tensors], Any], message: str
) -> None:
    folder = made(tmp_path, *made_by)
    packers.edit_tensors(folder, change)
    with pytest.raises(MalformedModel, match=message):
        load(folder, dtype=torch.float32)
