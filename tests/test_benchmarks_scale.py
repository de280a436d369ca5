"""Whose adapters requests name in benchmarks/scale.py: the definitions of S-LoRA and Punica."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scale


def test_slora_is_uniform_at_1_and_skewed_at_a_tenth() -> None:
    """numpy's power distribution has the cumulative distribution x^alpha on [0, 1)."""
    for alpha in (1.0, 0.1):
        found = scale.slora(40_000, 10, alpha, seed=1)
        assert min(found) >= 0 and max(found) <= 9
        for most in (1, 5, 9):
            share = sum(i < most for i in found) / len(found)
            assert share == pytest.approx((most / 10) ** alpha, abs=0.01)
    assert scale.slora(50, 1, 1.0, seed=3) == [0] * 50


def test_punica_deals_out_a_batch() -> None:
    assert scale.punica("distinct", 5) == [1] * 5
    assert scale.punica("identical", 5) == [5]
    assert scale.punica("uniform", 32) == [6, 6, 5, 5, 5, 5]
    assert scale.punica("zipf:1.5", 32) == [1, 1, 2, 3, 5, 7, 11, 2]
    for kind in ("distinct", "identical", "uniform", "zipf:1.5"):
        assert sum(scale.punica(kind, 32)) == 32
        counted = Counter(scale.punica_requests(kind, 32, 64))
        assert sorted(counted.values()) == sorted(2 * n for n in scale.punica(kind, 32))
