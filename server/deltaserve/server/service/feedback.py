"""What clients say of answers, checked."""

from __future__ import annotations

import math
import time

from deltaserve.server.ledger.feedback import Feedback
from deltaserve.server.service import convert
from deltaserve.server.service.report import Asked
from deltaserve.v1 import route_pb2 as pb

MAX_REWARD = 1e6
MAX_LABELS = 16
MAX_POINTS = 200
MAX_TUNED_FOR = 1_000_000_000


def feedback(request: pb.RecordFeedbackRequest, tenant: str) -> Feedback:
    """InvalidRequest."""
    names = ("request_id", "user", "route", "feedback_id")
    request_id, user, route, own = (convert.label(n, getattr(request, n)) for n in names)
    if request_id and (user or route):
        found = "request_id together with user or route"
        convert.refuse("request_id", found, "request_id alone, or route and user")
    if not request_id:
        for name, text in (("route", route), ("user", user)):
            if not text:
                convert.refuse(name, "''", "the name of one, or request_id that of an answer")
    reward = request.reward if request.HasField("reward") else None
    if reward is not None and not (math.isfinite(reward) and abs(reward) <= MAX_REWARD):
        right = f"a finite number from {-MAX_REWARD:.0f} to {MAX_REWARD:.0f}"
        convert.refuse("reward", f"{reward!r}", right)
    if len(request.labels) > MAX_LABELS:
        convert.refuse("labels", f"a map of {len(request.labels)}", f"at most {MAX_LABELS}")
    labels = {}
    for key, value in request.labels.items():
        if not key:
            convert.refuse("labels", "the key ''", "a name")
        labels[convert.label("labels", key)] = convert.label("labels", value)
    if reward is None and not labels:
        convert.refuse("reward", "feedback that says nothing", "a reward, or have labels")
    return Feedback(tenant, time.time(), request_id, route, user, reward, labels, own)


def asked(request: pb.GetReportRequest) -> Asked:
    """InvalidRequest."""
    default = Asked()
    level = request.level if request.HasField("level") else default.level
    if not 0 < level <= 0.5:
        convert.refuse("level", f"{level!r}", "above 0 and at most 0.5")
    if request.points > MAX_POINTS:
        convert.refuse("points", str(request.points), f"at most {MAX_POINTS}")
    tuned_for = request.tuned_for if request.HasField("tuned_for") else default.tuned_for
    if not 1 <= tuned_for <= MAX_TUNED_FOR:
        convert.refuse("tuned_for", str(tuned_for), f"from 1 to {MAX_TUNED_FOR} users")
    return Asked(level, request.cuped, request.points, tuned_for)
