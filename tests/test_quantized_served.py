"""Quantized checkpoints served as they are: every request of a mixed batch gets what transformers
+ PEFT compute with the float weights that the checkpoint stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packers
import pytest
import torch
from rig import load_base, request, running
from test_equivalence import check_every_kind, load_all, make_family, prompts
from torch import Tensor
from variants import logits_of, make_base, open_base

from deltaserve.server.engine.collector import generate
from deltaserve.server.model import BaseModel

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}

CHECKPOINTS: dict[str, tuple[packers.Pack, dict[str, Any]]] = {
    "gptq": (packers.gptq(4, 32), GPTQ),
    "gptq-asymmetric-in-order": (
        packers.gptq(3, 40, symmetric=False, order=True, v2=True),
        {
            **GPTQ,
            "bits": 3,
            "group_size": 40,
            "desc_act": True,
            "sym": False,
            "checkpoint_format": "gptq_v2",
        },
    ),
    "gptq-of-8-bits": (packers.gptq(8, 32, symmetric=False), {**GPTQ, "bits": 8, "sym": False}),
    "awq": (packers.awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "fp8-of-blocks": (
        packers.fp8("block", name="weight_scale_inv", block=(32, 24)),
        {"quant_method": "fp8", "weight_block_size": [32, 24]},
    ),
    "bitsandbytes": (
        packers.bnb4("nf4", double=True),
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
    ),
    "compressed-tensors": (
        packers.compressed(4, 32),
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
                }
            },
        },
    ),
}


def packed(source: Path, name: str) -> tuple[Path, Path]:
    """(the quantized checkpoint, the float one that it stands for)."""
    pack, config = CHECKPOINTS[name]
    folders = source.parent / "packed", source.parent / "plain"
    packers.write(source, *folders, pack, config)
    return folders


@pytest.mark.parametrize(
    ("name", "arch"), [(name, ("llama", "qwen2")[i % 2]) for i, name in enumerate(CHECKPOINTS)]
)
def test_every_kind_of_adapter(tmp_path: Path, name: str, arch: str) -> None:
    held: list[BaseModel] = []

    def as_served(folder: Path) -> Any:
        quantized, plain = packed(folder, name)
        held.append(load_base(quantized))
        return open_base(plain)

    family = make_family(tmp_path, arch, as_served)
    with running(held[0], [family.roots]) as engine:
        load_all(engine, family.roots)
        check_every_kind(family, engine, seed=7)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16(tmp_path: Path, name: str) -> None:
    """As near to the float32 model as transformers in bfloat16 with the dequantized weights; an
    answer may differ from its choice only where the two best are as near."""
    make_base(tmp_path / "base", "llama")
    quantized, plain = packed(tmp_path / "base", name)
    exact, rough = open_base(plain), open_base(plain).bfloat16()
    model = load_base(quantized, dtype="bfloat16")
    with running(model, []) as engine:
        asked = prompts(6, seed=3)
        answers = generate(engine, [request(p) for p in asked], timeout=60)
    ours, theirs = [], []
    for prompt, answer in zip(asked, answers, strict=True):
        ids = [*prompt, *answer.token_ids]
        said = torch.tensor([x.logprob for x in answer.logprobs])
        want = _logprobs(exact, ids, len(prompt))
        near = _logprobs(rough, ids, len(prompt))
        chosen = torch.tensor(answer.token_ids)[:, None]
        ours.append((said - want.gather(1, chosen)[:, 0]).abs())
        theirs.append((near - want).abs().amax(1))
        lead = want.amax(1) - want.gather(1, chosen)[:, 0]
        assert float(lead.max()) < 2 * float(theirs[-1].max())
    assert float(torch.cat(ours).mean()) < 1.2 * float(torch.cat(theirs).mean())


def _logprobs(model: Any, ids: list[int], start: int) -> Tensor:
    return torch.log_softmax(logits_of(model, ids[:-1])[start - 1 :], -1)
