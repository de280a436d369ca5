"""Whose adapters requests name in benchmarks/scale.py, and the adapters that it makes."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import popularity
import scale
import scale_adapters


def test_slora_is_uniform_at_1_and_skewed_at_a_tenth() -> None:
    """numpy's power distribution has the cumulative distribution x^alpha on [0, 1)."""
    for alpha in (1.0, 0.1):
        found = popularity.slora(40_000, 10, alpha, seed=1)
        assert min(found) >= 0 and max(found) <= 9
        for most in (1, 5, 9):
            share = sum(i < most for i in found) / len(found)
            assert share == pytest.approx((most / 10) ** alpha, abs=0.01)
    assert popularity.slora(50, 1, 1.0, seed=3) == [0] * 50


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_have_the_rate_and_the_coefficient_of_variation(cv: float) -> None:
    gaps = np.array(popularity.slora_gaps(200_000, 5.0, cv, seed=1))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_a_trace_differs_only_by_its_adapters_whatever_they_are() -> None:
    few, many = (popularity.slora_trace(50, n, 1.0, 64, rate=3.0) for n in (1, 1000))
    assert [a[1:] for a in few] == [a[1:] for a in many]
    assert {a.adapter for a in few} == {0} and len({a.adapter for a in many}) > 40
    assert all(8 <= n <= 64 for a in many for n in (a.prompt, a.answer))
    assert [a.at for a in many] == sorted({a.at for a in many}) and many[-1].at > 5
    assert {a.at for a in popularity.slora_trace(50, 9, 1.0, 64)} == {0.0}


def test_punica_deals_out_a_batch() -> None:
    assert popularity.punica("distinct", 5) == [1] * 5
    assert popularity.punica("identical", 5) == [5]
    assert popularity.punica("uniform", 32) == [6, 6, 5, 5, 5, 5]
    assert popularity.punica("zipf:1.5", 32) == [1, 1, 2, 3, 5, 7, 11, 2]
    for kind in popularity.PUNICA:
        assert sum(popularity.punica(kind, 32)) == 32
        trace = popularity.punica_trace(kind, 32, 64, 5000, 32, 16)
        counted = Counter(a.adapter for a in trace)
        assert sorted(counted.values()) == sorted(2 * n for n in popularity.punica(kind, 32))
        assert max(counted) < 5000


def test_adapters_are_distinct_and_what_peft_makes_of_their_shapes(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    folder = tmp_path / "adapters"
    folder.mkdir()
    made = scale_adapters.write_adapters(base, folder, 3)
    first, second, _ = (load_file(f / "adapter_model.safetensors") for f in made)
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in first.values())
    assert all(0.01 < t.float().std() < 0.1 for t in first.values())
    assert not any(torch.equal(first[name], second[name]) for name in first)
    wrapped = PeftModel.from_pretrained(model, made[1])
    held = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    assert len(held) == len(second) == 2 * 2 * 2
    for name, p in held.items():
        assert torch.equal(p, second[name.replace(".default", "")].to(p.dtype))


def test_shares_are_of_one_adapter_with_one_registered_and_with_as_many() -> None:
    rows = [
        {"what": "warm", "popularity": p, "registered": n, "tokens_per_second": t}
        for p, n, t in (("one", 1, 90.0), ("one", 1, 110.0), ("one", 9, 80.0), ("slora:1", 9, 60.0))
    ]
    scale.with_shares(rows)
    assert (rows[3]["to_one_adapter"], rows[3]["to_one_here"]) == (0.6, 0.75)
    assert json.dumps(rows)
