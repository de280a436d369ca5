"""What quantized checkpoints are beside being served: inspected, planned, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import archs
import packers
import pytest
import torch
from quantized import UP, made
from typer.testing import CliRunner

from deltaserve.server.cli import app
from deltaserve.server.model import UnsupportedModel, load
from deltaserve.server.model.loader import linear_shapes
from deltaserve.server.model.outline import outline
from deltaserve.server.model.peek import peek

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [8, 64]}
CHECKPOINTS: dict[str, tuple[packers.Pack, dict[str, Any]]] = {
    "gptq": (packers.gptq(4, 32), GPTQ),
    "fp8": (packers.fp8("block", name="weight_scale_inv", block=(8, 64)), FP8),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_base_is_seen_as_it_is_served(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path, *CHECKPOINTS[name])
    served = load(folder, dtype=torch.float32).spec
    with peek(folder) as found:
        assert found.spec.quantization == served.quantization
        assert dict(found.spec.tensor_digests) == served.tensor_digests
        assert found.fingerprinted().fingerprint == served.fingerprint
        for module in (UP, "lm_head", "model.embed_tokens", "model.norm"):
            assert torch.equal(found.spec.weight(module), served.weight(module)), module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_its_memory_is_known_before(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = made(tmp_path, *CHECKPOINTS[name])
    told = outline(folder, dtype=dtype).weights
    assert told == pytest.approx(load(folder, dtype=dtype).nbytes, rel=0.12)
    with pytest.raises(UnsupportedModel, match="--quantize int8"):
        outline(folder, dtype=dtype, quantize="int8")


def test_tuning_and_compressing_want_the_original_weights(tmp_path: Path) -> None:
    folder = made(tmp_path, *CHECKPOINTS["gptq"])
    with pytest.raises(UnsupportedModel, match="gptq-int4-g32"):
        linear_shapes(folder, dtype=torch.bfloat16)
    arguments = ["compress", "--base", folder, "--tuned", folder, "--out", tmp_path / "delta"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2 and "quantization_config" in done.stderr


def test_experts(tmp_path: Path) -> None:
    """transformers stacks them; what it stacks must be floats."""
    archs.build("mixtral").save_pretrained(tmp_path / "base")
    config = {**GPTQ, "group_size": 16}
    every = tmp_path / "packed", tmp_path / "plain"
    packers.write(tmp_path / "base", *every, packers.gptq(4, 16), config)
    with pytest.raises(UnsupportedModel, match=r"experts.* is quantized and a part of .*experts"):
        load(every[0], dtype=torch.float32)
    some = tmp_path / "packed-2", tmp_path / "plain-2"
    skip = ("lm_head", "w1", "w2", "w3", "gate")
    packers.write(tmp_path / "base", *some, packers.gptq(4, 16), config, skip=skip)
    model, plain = (load(folder, dtype=torch.float32) for folder in some)
    for module in model.spec.modules:
        torch.testing.assert_close(model.spec.weight(module), plain.spec.weight(module))
