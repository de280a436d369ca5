"""Balance: whether users get the arms that the weights say, though the weights change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

BELIEF = 100.0
"""As `belief` of `srm.log_evidence`."""

ROUNDING = 1e-9
"""Relative: what is smaller in a sum of a million shares may be rounding."""


class Balance:
    """Sums over the users that were assigned at random: of those an arm got, of the shares that
    it had when each user came, and of these shares' products. found, expected: by arm. covariance:
    by pair of arms, of `found`. evidence: logarithm of a martingale from 1 if the shares are
    right."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.expected: dict[str, float] = {}
        self.covariance: dict[tuple[str, str], float] = {}
        self.evidence = 0.0

    def add(self, arm: str, shares: Mapping[str, float]) -> None:
        """A user got `arm` when the arms had these shares, which add up to 1.

        The evidence grows by ln(q / p): p is the arm's share, q what those before say, p times
        (belief p + found) / (belief p + expected), made to add up to 1. While the shares do not
        change this is `srm.log_evidence`, the Dirichlet mixture of Lindon & Malek 2022; q depends
        on earlier users alone, so it is a martingale for any shares."""
        tilted = {
            a: p * (BELIEF * p + self.found.get(a, 0)) / (BELIEF * p + self.expected.get(a, 0.0))
            for a, p in shares.items()
            if p > 0
        }
        if arm in tilted:
            self.evidence += math.log(tilted[arm] / sum(tilted.values()) / shares[arm])
        else:
            self.evidence = math.inf  # an arm of share 0 gets nobody
        self.found[arm] = self.found.get(arm, 0) + 1
        for a, p in shares.items():
            self.expected[a] = self.expected.get(a, 0.0) + p
            for b, q in shares.items():
                here = p * ((a == b) - q)
                self.covariance[a, b] = self.covariance.get((a, b), 0.0) + here

    @property
    def anytime_p_value(self) -> float:
        """Holds however often one looks."""
        return math.exp(min(-self.evidence, 0.0))

    def p_value(self) -> float:
        """At one look: d' V^-1 d is chi-squared for d = found - expected of covariance V, which is
        Pearson's test if the shares never changed. 1 without users or with one arm."""
        arms = sorted(self.expected)
        if any(self.found.get(a, 0) and not self.expected.get(a) for a in self.found):
            return 0.0
        d = np.array([self.found.get(a, 0) - self.expected[a] for a in arms])
        v = np.array([[self.covariance.get((a, b), 0.0) for b in arms] for a in arms])
        v = v.reshape(len(arms), len(arms))
        if not v.any():
            return 1.0
        sizes, axes = np.linalg.eigh(v)
        real = sizes > ROUNDING * sizes.max()  # the arms' numbers add up, so V has no inverse
        statistic = ((d @ axes[:, real]) ** 2 / sizes[real]).sum()
        return float(stats.chi2.sf(statistic, np.count_nonzero(real)))

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        pairs = [[a, b, v] for (a, b), v in self.covariance.items()]
        evidence = None if math.isinf(self.evidence) else self.evidence
        return {
            "found": self.found,
            "expected": self.expected,
            "covariance": pairs,
            "evidence": evidence,
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Balance:
        """`dump` back."""
        balance = cls()
        balance.found, balance.expected = dict(dumped["found"]), dict(dumped["expected"])
        balance.covariance = {(a, b): v for a, b, v in dumped["covariance"]}
        evidence = dumped["evidence"]
        balance.evidence = math.inf if evidence is None else evidence
        return balance
