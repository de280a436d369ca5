"""What the tests of the quantized formats have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packers
import torch
from safetensors.torch import load_file
from variants import make_base

from deltaserve.server.model import BaseModel, load

UP = "model.layers.1.mlp.up_proj"


def made(tmp_path: Path, pack: packers.Pack, config: dict[str, Any], arch: str = "llama") -> Path:
    """The packed checkpoint; beside it, in "plain", the float weights that it stands for."""
    make_base(tmp_path / "base", arch)
    packers.write(tmp_path / "base", tmp_path / "packed", tmp_path / "plain", pack, config)
    return tmp_path / "packed"


def check_weights(folder: Path, dtype: torch.dtype = torch.float32) -> BaseModel:
    """Every linear's weight is the one that the checkpoint stands for, to the last bit or so."""
    model = load(folder, dtype=dtype)
    plain = load_file(folder.parent / "plain" / "model.safetensors")
    names = [n for n in model.spec.modules if f"{n}.weight" in plain]
    assert len(names) > 14
    for name in names:
        packed = "layers" in name and "norm" not in name
        want = plain[f"{name}.weight"].to(torch.float32 if packed else dtype).float()
        torch.testing.assert_close(model.spec.weight(name), want, rtol=3e-7, atol=1e-9)
    return model


def kinds(model: BaseModel) -> set[str]:
    """Of the linears but the head."""
    groups = model.modules.group_of
    return {type(group.base).__name__ for name, group in groups.items() if name != "lm_head"}
