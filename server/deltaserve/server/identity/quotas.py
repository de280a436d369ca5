"""Quotas: how much each tenant may ask for.

Rates are token buckets: one holds what may be asked for in a minute, is full at first, and fills
evenly. What a request will generate is not known when it is admitted, so it takes all that it may,
and gives back what it did not use. Times are the monotonic clock's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deltaserve.server.errors import QuotaExceeded
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.records import Tenant

MINUTE = 60.0
ROUNDING = 1e-6
"""Who comes back when it was told to must not be refused for the last digit."""
REQUESTS, TOKENS = "requests_per_minute", "tokens_per_minute"


@dataclass(slots=True)
class Bucket:
    """level: what may be taken at the time `at`, in seconds; below 0 after a request used more than
    it took. size: what it holds, and is filled with in a minute."""

    size: int
    level: float
    at: float

    def resized(self, size: int, now: float) -> Bucket:
        """The same bucket after a quota was changed."""
        return Bucket(size, min(self._level(now), size), now)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much, or a full bucket, can be taken."""
        missing = min(amount, self.size) - self._level(now)
        return missing * MINUTE / self.size if missing > ROUNDING else 0.0

    def take(self, amount: float, now: float) -> None:
        """Negative to give back."""
        self.level = min(self._level(now) - amount, self.size)
        self.at = now

    def _level(self, now: float) -> float:
        return min(self.level + (now - self.at) * self.size / MINUTE, self.size)


@dataclass(slots=True)
class Spent:
    """What a tenant has spent. buckets: by the quota's name."""

    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)

    def bucket(self, name: str, size: int, now: float) -> Bucket:
        """As it is now; a full one if there was none."""
        known = self.buckets.get(name)
        return known.resized(size, now) if known is not None else Bucket(size, size, now)


@dataclass(slots=True)
class Charge:
    """What a request was admitted with. used: the tokens that it used, once it is known."""

    used: int = 0


class Quotas:
    """Belongs to one event loop. book: has the tenants."""

    def __init__(self, book: Book, clock: Callable[[], float] = time.monotonic) -> None:
        self._book = book
        self._clock = clock
        self._spent: dict[str, Spent] = {}

    @contextmanager
    def admitted(self, tenant: str, tokens: int) -> Iterator[Charge]:
        """A request, from its admission to its end. tokens: that it may use at most; what the
        charge says in the end stays spent. QuotaExceeded."""
        quotas = self._book.tenant(tenant) if tenant else None
        if quotas is None:
            yield Charge()
            return
        spent, now = self._spent.setdefault(tenant, Spent()), self._clock()
        wanted = {REQUESTS: 1, TOKENS: tokens}
        buckets = spent.buckets = {
            name: spent.bucket(name, getattr(quotas, name), now)
            for name in wanted
            if getattr(quotas, name)
        }
        waits = {name: bucket.wait(wanted[name], now) for name, bucket in buckets.items()}
        _check(quotas, spent, wanted, waits)
        taken = {name: min(wanted[name], bucket.size) for name, bucket in buckets.items()}
        for name, amount in taken.items():
            buckets[name].take(amount, now)
        spent.running += 1
        charge = Charge()
        try:
            yield charge
        finally:
            spent.running -= 1
            if TOKENS in taken and TOKENS in spent.buckets:
                spent.buckets[TOKENS].take(charge.used - taken[TOKENS], self._clock())


def _check(quotas: Tenant, spent: Spent, wanted: dict[str, int], waits: dict[str, float]) -> None:
    whose, most = f"the tenant {quotas.name!r}", quotas.concurrent_requests
    if most and spent.running >= most:
        raise QuotaExceeded(
            f"{spent.running} requests of {whose} wait or run, its quota is {most}: try again when "
            "one of them has ended"
        )
    name = max(waits, key=waits.__getitem__, default="")
    if name and waits[name]:
        asked = "" if name == REQUESTS else f", and this request may use {wanted[name]}"
        raise QuotaExceeded(
            f"the quota of {whose} is {getattr(quotas, name)} {name.partition('_')[0]} a minute"
            f"{asked}: try again in {waits[name]:.1f} s",
            retry_after=waits[name],
        )
