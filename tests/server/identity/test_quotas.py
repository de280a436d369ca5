"""Quotas: what is left, when to come back, and what is given back."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
from issue import issue
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.errors import QuotaExceeded
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.quotas import Quotas
from deltaserve.server.identity.records import Tenant
from deltaserve.server.service.identity import Identity


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def quotas(*tenants: Tenant) -> tuple[Quotas, Clock]:
    clock = Clock()
    return Quotas(Book(tenants=tenants), clock), clock


def spend(q: Quotas, tenant: str, most: int, used: int | None = None) -> None:
    with q.admitted(tenant, most) as charge:
        charge.used = most if used is None else used


def refused(q: Quotas, tenant: str, most: int) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        spend(q, tenant, most)
    return caught.value


def test_requests_in_a_minute() -> None:
    q, clock = quotas(Tenant("a", requests_per_minute=6), Tenant("b", requests_per_minute=6))
    for _ in range(6):
        spend(q, "a", 5)
    error = refused(q, "a", 5)
    assert error.retry_after == 10 and "'a' is 6 requests a minute: try again in 10.0 s" in str(
        error
    )
    spend(q, "b", 5)
    clock.now += 9.99
    assert refused(q, "a", 5).retry_after == pytest.approx(0.01)
    clock.now += 0.01
    spend(q, "a", 5)
    clock.now += 3600  # no more than a minute's worth is saved up
    for _ in range(6):
        spend(q, "a", 5)
    refused(q, "a", 5)


def test_tokens_are_taken_before_and_given_back_after() -> None:
    q, clock = quotas(Tenant("a", tokens_per_minute=600))
    with q.admitted("a", 500) as charge:
        error = refused(q, "a", 200)
        assert error.retry_after == 10 and "this request may use 200" in str(error)
        charge.used = 100
    spend(q, "a", 500)  # 400 were given back
    assert refused(q, "a", 1).retry_after == pytest.approx(0.1)
    clock.now += 60
    with pytest.raises(ZeroDivisionError), q.admitted("a", 600):
        raise ZeroDivisionError  # the engine took nothing
    spend(q, "a", 10_000, used=900)  # more than there ever is: it needs a full bucket
    assert refused(q, "a", 1).retry_after == pytest.approx(30.1)


def test_concurrent_requests() -> None:
    q, _ = quotas(Tenant("a", concurrent_requests=2))
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(q.admitted("a", 5))
        error = refused(q, "a", 5)
        assert error.retry_after is None and "its quota is 2" in str(error)
    with q.admitted("a", 5), q.admitted("a", 5):
        pass


def test_who_has_no_quota() -> None:
    q, _ = quotas(Tenant("a"))
    with ExitStack() as running:
        for tenant in ("a", "", "unheard of") * 100:
            running.enter_context(q.admitted(tenant, 1 << 40))


def test_a_quota_that_is_changed() -> None:
    book, clock = Book(tenants=[Tenant("a", tokens_per_minute=600)]), Clock()
    q = Quotas(book, clock)
    spend(q, "a", 600)
    book.put_tenant(Tenant("a", tokens_per_minute=1200))
    assert refused(q, "a", 20).retry_after == pytest.approx(1.0), "it is not full for that"
    clock.now += 60
    book.put_tenant(Tenant("a", tokens_per_minute=60))
    spend(q, "a", 60)
    refused(q, "a", 1)
    book.put_tenant(Tenant("a"))
    spend(q, "a", 10**9)


def test_who_comes_back_when_told_is_admitted() -> None:
    """On random loads; and never is more used, in any time from a full bucket on, than it held and
    was filled with."""
    draw = random.Random(5)
    for _ in range(200):
        size = draw.randint(1, 10_000)
        q, clock = quotas(Tenant("a", tokens_per_minute=size, requests_per_minute=size))
        began, used = clock.now, 0
        for _ in range(50):
            most = draw.randint(1, size)
            try:
                with q.admitted("a", most) as charge:
                    charge.used = draw.randint(0, most)
                used += charge.used
            except QuotaExceeded as error:
                assert error.retry_after
                clock.now += error.retry_after * 0.9
                refused(q, "a", most)
                clock.now += error.retry_after * 0.1
                spend(q, "a", most)
                used += most
            assert used <= size * (1 + (clock.now - began) / 60) + 1e-3
            clock.now += draw.expovariate(1.0)


async def test_over_the_wire() -> None:
    """Two keys of a tenant have one quota; how much a call uses is what its usage says."""
    book = Book(tenants=[Tenant("acme", tokens_per_minute=100), Tenant("b", concurrent_requests=1)])
    one, two = (issue(book, Role.GENERATE)[1] for _ in range(2))
    other = issue(book, Role.GENERATE, tenant="b")[1]
    async with (
        served(identity=Identity(book)) as s,
        AsyncClient(s.address, token=one) as a,
        AsyncClient(s.address, token=two) as b,
        AsyncClient(s.address, token=other) as c,
    ):
        quota = s.server.services.quotas
        quota._clock = Clock()
        for call, used in (
            (lambda: a.generate([5] * 10, max_tokens=5, n=4), 10 + 4 * 5),
            (lambda: b.score([5] * 10, [[6], [7, 8]]), 11 + 12),
        ):
            await call()
            bucket = quota._spent["acme"].buckets["tokens_per_minute"]
            assert 100 - bucket.level == used
            bucket.level = 100
        with pytest.raises(errors.ResourceExhausted, match="100 tokens a minute") as caught:
            await b.generate([5] * 10, max_tokens=25, n=2)
            await a.generate([5] * 10, max_tokens=45)
        error = caught.value
        assert error.reason == "QUOTA_EXCEEDED" and error.retry_after == pytest.approx(60 * 0.15)
        stream = c.stream("x", max_tokens=4000)
        await anext(aiter(stream))
        with pytest.raises(errors.ResourceExhausted, match="its quota is 1"):
            await c.generate("x")
        await stream.aclose()  # type: ignore[attr-defined]
        async with AsyncClient(s.address, token=other) as again:
            for _ in range(100):
                try:
                    await again.generate("x", max_tokens=1)
                    break
                except errors.ResourceExhausted:
                    continue
            else:
                pytest.fail("a cancelled request counts for ever")
