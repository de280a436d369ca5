"""bitsandbytes checkpoints: what is held is what they stand for, and what is refused says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packers
import pytest
import torch
from packers import Tensors
from quantized import UP, check_weights, kinds, made

from deltaserve.server.model import MalformedModel, UnsupportedModel, load

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes(tmp_path: Path, kind: str, block: int, double: bool) -> None:
    """Blocks of 64 and 128 weights run on over rows of 96."""
    config = {**NF4, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    pack = packers.bnb4(kind, block=block, double=double)
    model = check_weights(made(tmp_path, pack, config))
    assert kinds(model) == {"Code4Linear"}
    assert model.spec.quantization == f"bitsandbytes-{kind}"


def test_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = check_weights(made(tmp_path, packers.bnb8(), INT8, arch="qwen2"))
    assert kinds(model) == {"Int8Linear"} and model.spec.quantization == "bitsandbytes-int8"
    assert "activations" in caplog.text


def test_bytes_stored_as_floats(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`: some of these would not be numbers."""
    folder = made(tmp_path, packers.bnb4("nf4"), NF4)

    def store(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            tensors[name] = tensors[name].view(-1).view(torch.bfloat16)[:, None]

    packers.edit_tensors(folder, store)
    check_weights(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("load_in_4bit", False),
        ("load_in_4bit", "yes"),
        ("load_in_8bit", True),
        ("bnb_4bit_quant_type", "nf3"),
        ("llm_int8_has_fp16_weight", True),
        ("surprise", 1),
    ],
)
def test_refused_fields(tmp_path: Path, field: str, value: Any) -> None:
    folder = made(tmp_path, packers.bnb4("nf4"), {**NF4, field: value})
    with pytest.raises(UnsupportedModel, match=rf"quantization_config\..*{field}"):
        load(folder, dtype=torch.float32)


def state(**changes: Any) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        old = json.loads(bytes(tensors[f"{UP}.{STATE}"].tolist()))
        text = json.dumps({**old, **changes}).encode()
        tensors[f"{UP}.{STATE}"] = torch.tensor(list(text), dtype=torch.uint8)

    return change


def put(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda t: t.update({f"{UP}.{part}": change(t[f"{UP}.{part}"])})


CODES = packers.bnb4("nf4", double=True), NF4
ROWS = packers.bnb8(), INT8


@pytest.mark.parametrize(
    ("made_by", "change", "message"),
    [
        (CODES, lambda t: t.pop(f"{UP}.weight"), r"up_proj\.weight is missing"),
        (CODES, lambda t: t.pop(f"{UP}.weight.absmax"), r"weight\.absmax is missing"),
        (CODES, lambda t: t.pop(f"{UP}.weight.quant_map"), r"weight\.quant_map is missing"),
        (CODES, lambda t: t.pop(f"{UP}.weight.nested_quant_map"), r"nested_quant_map is missing"),
        (CODES, lambda t: t.pop(f"{UP}.weight.nested_absmax"), r"weight\.absmax is torch\.uint8"),
        (CODES, put("weight", lambda t: t[:-1]), r"weight has 3071 bytes; .* need 3072"),
        (CODES, put("weight.absmax", lambda t: t[:-1]), r"weight\.absmax has shape \(95,\)"),
        (CODES, put("weight.quant_map", lambda t: t.flip(0)), r"quant_map is not nf4"),
        (CODES, put("weight.nested_absmax", lambda t: t / 0), r"nested_absmax has values that ar"),
        (CODES, put(STATE, lambda t: t[:-1]), r"nf4 is not JSON"),
        (CODES, put(STATE, lambda t: t[:0] + 0), r"nf4 is not JSON"),
        (CODES, state(shape=[64, 96]), r"nf4 has shape \[64, 96\]"),
        (CODES, state(quant_type="fp4"), r"quant_type 'fp4'"),
        (CODES, state(blocksize=0), r"blocksize 0"),
        ((packers.bnb4("nf4", block=4), NF4), lambda t: None, r"blocks of 4 weights"),
        (CODES, state(nested_blocksize=None), r"nested_blocksize None"),
        (CODES, state(nested_offset=None), r"nested_offset None"),
        ((packers.bnb4("nf4"), INT8), lambda t: None, r"which is not bitsandbytes-int8"),
        ((packers.bnb8(), NF4), lambda t: None, r"which is not bitsandbytes-nf4"),
        (ROWS, put("SCB", lambda t: t[1:]), r"SCB has shape \(95,\)"),
        (ROWS, put("SCB", lambda t: t / 0), r"SCB has values that are not finite"),
        (ROWS, put("weight_format", lambda t: t + 1), r"weight_format is 1"),
    ],
)
def test_broken_files(
    tmp_path: Path, made_by: tuple[Any, Any], change: Callable[[Tensors], Any], message: str
) -> None:
    folder = made(tmp_path, *made_by)
    packers.edit_tensors(folder, change)
    with pytest.raises((MalformedModel, UnsupportedModel), match=message):
        load(folder, dtype=torch.float32)
