"""Feedback and reports as Python values <-> messages."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from deltaserve.clients import route_messages
from deltaserve.clients.errors import InvalidArgument
from deltaserve.clients.report_types import (
    ArmReport,
    Estimate,
    FeedbackTarget,
    Quantiles,
    Report,
    ReportPoint,
    SampleRatio,
)
from deltaserve.v1 import route_pb2 as pb


def feedback(
    request_id: str,
    reward: float | None,
    labels: Mapping[str, str] | None,
    feedback_id: str,
    route: str,
    user: str,
) -> pb.RecordFeedbackRequest:
    """A RecordFeedbackRequest."""
    try:
        return pb.RecordFeedbackRequest(
            request_id=request_id,
            reward=reward,
            labels=labels,
            feedback_id=feedback_id,
            route=route,
            user=user,
        )
    except (TypeError, ValueError) as error:
        code = grpc.StatusCode.INVALID_ARGUMENT
        raise InvalidArgument(f"record_feedback: {error}", code) from error


def target(message: pb.RecordFeedbackResponse) -> FeedbackTarget:
    """What it counts for."""
    return FeedbackTarget(message.route, message.arm)


def ask(
    route: str, level: float | None, cuped: bool, points: int, tuned_for: int | None
) -> pb.GetReportRequest:
    """A GetReportRequest."""
    try:
        return pb.GetReportRequest(
            route=route, level=level, cuped=cuped, points=points, tuned_for=tuned_for
        )
    except (TypeError, ValueError) as error:
        code = grpc.StatusCode.INVALID_ARGUMENT
        raise InvalidArgument(f"get_report: {error}", code) from error


def report(message: pb.GetReportResponse) -> Report:
    """The whole of it."""
    ratio = message.sample_ratio
    return Report(
        route=route_messages.route(message.route),
        start_time=message.start_time.ToNanoseconds() / 1e9,
        arms=tuple(map(_arm, message.arms)),
        sample_ratio=SampleRatio(
            ratio.mismatch, ratio.p_value, ratio.anytime_p_value, dict(ratio.expected)
        )
        if message.HasField("sample_ratio")
        else SampleRatio(),
        history=tuple(
            ReportPoint(
                p.time.ToNanoseconds() / 1e9,
                p.arm,
                p.rewarded_users,
                _estimate(p.reward),
                _estimate(p.difference) if p.HasField("difference") else None,
            )
            for p in message.history
        ),
        warnings=tuple(message.warnings),
    )


def _arm(arm: pb.ArmReport) -> ArmReport:
    of = {
        name: _estimate(getattr(arm, name)) if arm.HasField(name) else None
        for name in ("reward", "difference", "difference_one_look")
    }
    reduction = arm.variance_reduction if arm.HasField("variance_reduction") else None
    return ArmReport(
        arm=arm.arm,
        shadow=arm.shadow,
        requests=arm.requests,
        anonymous_requests=arm.anonymous_requests,
        users=arm.users,
        rewarded_users=arm.rewarded_users,
        detectable=arm.detectable,
        shares={name: _estimate(arm.shares[name]) for name in sorted(arm.shares)},
        first_token_seconds=_quantiles(arm.first_token_seconds),
        seconds=_quantiles(arm.seconds),
        prompt_tokens=arm.prompt_tokens,
        completion_tokens=arm.completion_tokens,
        variance_reduction=reduction,
        **of,
    )


def _estimate(message: pb.Estimate) -> Estimate:
    return Estimate(message.value, message.low, message.high)


def _quantiles(message: pb.Quantiles) -> Quantiles:
    return Quantiles(message.p50, message.p90, message.p99, message.mean)
