"""`deltaserve tune` up to where a GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deltaserve.kernels.gpu import config
from deltaserve.kernels.gpu.base import make_linear
from deltaserve.kernels.gpu.config import GemmConfig
from deltaserve.kernels.gpu.tune import Found
from deltaserve.kernels.gpu.variants import GroupSpec
from deltaserve.server.cli import app
from deltaserve.server.model.loader import LinearShape, linear_shapes
from deltaserve.server.tune import TuneError, groups, numbers, write

ZOO = Path(__file__).parent.parent.parent / "demo" / "zoo" / "base"


def test_the_shapes_of_a_model() -> None:
    shapes = linear_shapes(ZOO, dtype=torch.bfloat16, quantize="int4", group_size=128)
    by_count = {len(shape.parts): shape for shape in shapes}
    assert set(by_count) == {1, 2, 3}  # o, down and the head; gate and up; q, k and v
    assert by_count[3].bits == 4 and by_count[2].parts[0] == by_count[2].parts[1]
    assert any(shape.bits == 8 for shape in shapes)  # the head
    dense = linear_shapes(ZOO, dtype=torch.bfloat16)
    assert {shape.bits for shape in dense} == {None} and len(dense) == len(shapes)


def test_gate_and_up_are_measured_both_ways() -> None:
    specs = groups(LinearShape(64, (96, 96), 4), 128, torch.bfloat16)
    assert [spec.activation for spec in specs] == [None, "silu"]
    assert specs[1].key.gated and specs[0].key.out_features == 192
    assert len(groups(LinearShape(64, (96, 32), None), 128, torch.float16)) == 1


@pytest.mark.parametrize(
    ("bits", "quantize", "activations"),
    [
        (None, "none", "float"),
        (8, "int8", "float"),
        (4, "int4", "float"),
        (8, "int8", "int8"),
        (4, "int4", "int8"),
    ],
)
def test_what_is_measured_is_what_is_looked_up(
    bits: int | None, quantize: str, activations: str
) -> None:
    linear = make_linear(
        torch.randn(96, 256), None, dtype=torch.float16, quantize=quantize, group_size=64,
        device=torch.device("cpu"), activations=activations,
    )  # fmt: skip
    (spec,) = groups(LinearShape(256, (64, 32), bits), 64, torch.float16, activations)
    assert spec.key == linear.weights.key()


def test_numbers_of_tokens() -> None:
    assert numbers("16, 1,5") == [1, 8, 16] and numbers("all") == list(config.BUCKETS)
    for wrong in ("", "0", "1,x", "-1", "5000"):
        with pytest.raises(TuneError, match="--tokens is"):
            numbers(wrong)


def test_what_is_found_is_used_and_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTASERVE_CACHE", str(tmp_path))
    config.table.cache_clear()
    spec = GroupSpec("tune", "int4", 4096, (4096,))
    one, two = GemmConfig(8, 32, 128), GemmConfig(64, 128, 64, 1, "after", 8, 5)
    about = {"gpu": "none"}
    write([Found(spec, 1, one, 2.0, 3.0)], 77, config.user_folder(), about)
    path = write([Found(spec, 64, two, 2.0, 3.0)], 77, config.user_folder(), about)
    assert path == tmp_path / "configs" / "sm_77.json"
    assert config.gemm_config(spec.key, 1, 77) == one
    assert config.gemm_config(spec.key, 60, 77) == two
    config.table.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--base", str(ZOO)], "no CUDA device"),
        (["--base", str(ZOO), "--dtype", "int3"], '--dtype is "int3"'),
        (["--base", str(ZOO), "--quantize", "int3"], "int3"),
        (["--base", str(ZOO), "--activations", "int4"], '--activations is "int4"'),
        (["--base", str(ZOO), "--quantize", "none", "--activations", "int8"], "--quantize int8"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == 2 and message in result.stderr
