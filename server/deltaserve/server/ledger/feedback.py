"""What is said of answers and of users, and what it counts for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaserve.server.ledger.book import Counts
from deltaserve.server.ledger.names import feedback_key


@dataclass(frozen=True, slots=True)
class Feedback:
    """On the answer `request_id`, or on `user` of `route`. id: the client's name for it. at:
    `time.time()`."""

    tenant: str
    at: float
    request_id: str = ""
    route: str = ""
    user: str = ""
    reward: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    def key(self) -> bytes:
        """Feedback of the same key replaces it."""
        if self.id:
            return feedback_key(self.tenant, "id", self.id)
        if self.request_id:
            return feedback_key(self.tenant, "request", self.request_id)
        return feedback_key(self.tenant, "user", self.route, self.user)


@dataclass(frozen=True, slots=True)
class Answer:
    """Of whom feedback is: an answer, or all that a user got. book: its id. user: key, None for
    nobody. request: key of the answer, None for a user's feedback."""

    book: int
    route: str
    arm: str
    user: int | None
    counts: Counts
    request: bytes | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """Feedback as it is kept."""

    key: bytes
    at: float
    answer: Answer
    reward: float | None
    labels: Mapping[str, str]
