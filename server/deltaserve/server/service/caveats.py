"""What a reader of a report must know."""

from __future__ import annotations

from collections.abc import Iterator

from deltaserve.server.experiments.sequences import START
from deltaserve.server.ledger.book import Book
from deltaserve.server.routes.route import Standing, State
from deltaserve.v1 import route_pb2 as pb


def caveats(
    response: pb.GetReportResponse,
    standing: Standing,
    book: Book | None,
    cuped: bool,
    crossed: int = 0,
) -> Iterator[str]:
    """response: complete but for these. crossed: users that several arms answered."""
    if standing.state is not State.ACTIVE:
        yield f"the route is {standing.state.value.replace('_', ' ')}: {standing.reason}"
    if book is None:
        yield "nothing was recorded since counting began"
        return
    answering = [arm for arm in response.arms if not arm.shadow]
    if response.sample_ratio.mismatch:
        yield (
            "the arms do not have the users that their weights say (sample_ratio): something loses "
            "users of one arm, and the differences mean nothing until it is found"
        )
    if standing.route.bandit is not None:
        yield (
            "the weights follow the rewards (bandit): the intervals of differences do not hold, "
            "and means are biased towards arms that were lucky early"
        )
    elif book.moved:
        yield (
            "the weights changed while users came: the arms' users are not of the same times, so a "
            "trend over time may look like a difference"
        )
    if len(answering) > 1 and not book.randomized():
        yield (
            "no user was assigned at random, since one arm has all the weight: the arms' users are "
            "not comparable"
        )
    for arm in answering:
        if arm.rewarded_users < START:
            yield (
                f"arm {arm.arm!r} has {arm.rewarded_users} users with a reward: there is no "
                f"interval that may be looked at before {START}"
            )
    requests = sum(arm.requests for arm in answering)
    if nobodys := sum(arm.anonymous_requests for arm in answering):
        yield (
            f"{nobodys} of {requests} requests had no user or were outside of the experiment: they "
            "count in durations and tokens alone"
        )
    if crossed:
        yield (
            f"{crossed} users were answered by more than one arm, since the weights changed: they "
            "count for the first, with what that arm answered"
        )
    if book.uncounted:
        yield (
            f"{book.uncounted} requests were of users that there was no memory for: the report is "
            "of those who came before"
        )
    if cuped and not any(arm.HasField("variance_reduction") for arm in answering):
        yield (
            "no rewards were adjusted: no user has one from before it was assigned at random, or "
            "none differ"
        )
