"""Combined distributions against the formulas, written out with probabilities in numpy."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.server.engine.combine import combine, divergence
from deltaserve.server.engine.core import Rule

Array = npt.NDArray[np.float64]


def draw(members: int, vocabulary: int = 50, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(members, vocabulary, generator=generator) * scale


def softmax(logits: torch.Tensor) -> Array:
    z = logits.double().numpy()
    e: Array = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expected(logits: torch.Tensor, weights: list[float], rule: Rule, alpha: float) -> Array:
    p, w = softmax(logits), np.array(weights)[:, None]
    mixed: Array = (w * p).sum(0) if rule is Rule.MEAN else np.prod(p**w, 0)
    mixed = np.where(p[0] >= alpha * p[0].max() * (1 - 1e-12), mixed, 0.0)
    return mixed / mixed.sum()


@given(
    members=st.integers(1, 8),
    rule=st.sampled_from(Rule),
    alpha=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_the_formulas(members: int, rule: Rule, alpha: float, seed: int) -> None:
    logits = draw(members, seed=seed)
    weights = torch.randn(members, generator=torch.Generator().manual_seed(seed + 1)).double()
    given = (weights.abs() if rule is Rule.MEAN else 2 * weights).tolist()
    found = torch.softmax(combine(logits, given, rule, alpha).double(), -1).numpy()
    np.testing.assert_allclose(found, expected(logits, given, rule, alpha), rtol=1e-4, atol=1e-9)


def test_equal_members_are_one() -> None:
    one = draw(1)
    for rule in Rule:
        found = combine(one.expand(4, -1), [0.25] * 4, rule)
        torch.testing.assert_close(found, torch.log_softmax(one[0], -1), rtol=1e-6, atol=1e-6)


def test_one_member_alone_is_unchanged() -> None:
    one = draw(1)
    assert torch.equal(combine(one, [1.0], Rule.PRODUCT), one[0])
    assert torch.equal(combine(one, [0.3], Rule.MEAN), one[0])
    assert not torch.equal(combine(one, [0.3], Rule.PRODUCT), one[0])


def test_large_weights_that_cancel_keep_their_digits() -> None:
    """1000 (a - b) + a with a nearly b: float32 log-probabilities would lose it."""
    a = draw(1)[0]
    b = a + draw(1, seed=1)[0] * 1e-4
    found = combine(torch.stack([a, a, b]), [1.0, 1000.0, -1000.0], Rule.PRODUCT)
    exact = torch.log_softmax(a.double() + 1000 * (a.double() - b.double()), -1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_token_without_probability() -> None:
    logits = draw(2)
    logits[1, 3] = -math.inf
    mean = combine(logits, [1.0, 1.0], Rule.MEAN)
    half = torch.log_softmax(logits[0], -1)[3] - math.log(2)
    torch.testing.assert_close(mean[3], half)
    for weights in ([1.0, 0.5], [1.0, -0.5]):
        product = combine(logits, weights, Rule.PRODUCT)
        assert product[3] == -math.inf and not product.isnan().any()
        assert product.exp().sum() == pytest.approx(1)
    assert torch.isfinite(combine(logits, [1.0, 0.0], Rule.PRODUCT)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_member_that_is_not_finite_spoils_all(bad: float) -> None:
    for weights in ([1.0, 1.0], [1.0, 0.0]):
        logits = draw(2)
        logits[1, 5] = bad
        assert combine(logits, weights, Rule.MEAN).isnan().all()
        assert combine(logits, weights, Rule.PRODUCT).isnan().all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e30, 0.0, -1e30], [-1e30, 0.0, 1e30]])
    for rule in Rule:
        assert not combine(logits, [1.0, 1.0], rule).isnan().any()
    assert divergence(logits, [1.0, 1.0], Rule.MEAN) == pytest.approx(math.log(2))


@given(members=st.integers(1, 8), rule=st.sampled_from(Rule), seed=st.integers(0, 10**6))
def test_divergence_is_entropy_of_the_mixture_less_mean_entropy(
    members: int, rule: Rule, seed: int
) -> None:
    logits = draw(members, seed=seed)
    weights = torch.rand(members, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    w = weights.numpy() if rule is Rule.MEAN else np.ones(members)
    pi, p = w / w.sum(), softmax(logits)
    mixed = (pi[:, None] * p).sum(0)
    reference = -(mixed * np.log(mixed)).sum() + (pi * (p * np.log(p)).sum(-1)).sum()
    found = divergence(logits, weights.tolist(), rule)
    assert found == pytest.approx(reference, abs=1e-9)
    assert 0 <= found <= math.log(members) + 1e-12


def test_divergence_without_probability() -> None:
    logits = draw(2)
    logits[0, :25], logits[1, 25:] = -math.inf, -math.inf
    assert divergence(logits, [1.0, 1.0], Rule.PRODUCT) == pytest.approx(math.log(2))
    assert divergence(logits, [1.0, 0.0], Rule.MEAN) == 0
