"""Book: what came of one epoch of a route."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from deltaserve.server.experiments.samples import Numbers, Sample
from deltaserve.server.ledger.balance import Balance
from deltaserve.server.ledger.histogram import Histogram
from deltaserve.server.ledger.looks import Looks
from deltaserve.server.ledger.tally import Tallies, Tally
from deltaserve.server.ledger.trial import Ended, Trial
from deltaserve.server.ledger.users import Met, Rows, Users

_PLAIN = ("shadow", "requests", "anonymous", "prompt_tokens", "completion_tokens")


# plain numbers: those of an enumeration are slow to get, and every request gets some
_ERROR, _REFUSAL, _EMPTY = int(Met.ERROR), int(Met.REFUSAL), int(Met.EMPTY)
_SLOW, _SLOW_FIRST_TOKEN, _LONG = int(Met.SLOW), int(Met.SLOW_FIRST_TOKEN), int(Met.LONG)
_RANDOMIZED, _CROSSED, _SHADOW = int(Met.RANDOMIZED), int(Met.CROSSED), int(Met.SHADOW)


NONE: Numbers = np.zeros(0)


class Counts(IntEnum):
    """What a trial, and feedback on it, counts for. Kept in the database by number."""

    NOTHING = 0  # of the user: anonymous, a shadow's, or by another arm than the user's
    BEFORE = 1  # before the user was assigned at random
    EXPERIMENT = 2


@dataclass
class Totals:
    """Of one arm's requests, whoever sent them. anonymous: without a user or outside of the
    experiment. Durations: of answers alone."""

    shadow: bool = False
    requests: int = 0
    anonymous: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)

    def add(self, trial: Trial) -> None:
        self.requests += 1
        self.prompt_tokens += trial.prompt_tokens
        self.completion_tokens += trial.completion_tokens
        if trial.ended is Ended.ANSWERED:
            self.seconds.add(trial.seconds)
            if trial.first_token > 0:
                self.first_token.add(trial.first_token)

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in _PLAIN} | {
            name: {"buckets": list(h.buckets.items()), "total": h.total}
            for name, h in (("seconds", self.seconds), ("first_token", self.first_token))
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Totals:
        """`dump` back."""
        histograms = {
            name: Histogram(dict(dumped[name]["buckets"]), dumped[name]["total"])
            for name in ("seconds", "first_token")
        }
        return cls(**{**dumped, **histograms})


class Book:
    """A user counts for the arm of the first request that was assigned at random, that is while
    more than one arm had a weight; until there was one, for the arm of its first request. A request
    that another arm answers later is counted in that arm's totals, and for no user.

    id: in the database. past: rewards before the epoch, by user: their sum and number; those of
    users who are here are in their rows instead."""

    def __init__(
        self,
        route: str,
        epoch: int,
        start: float,
        id: int = 0,
        past: Mapping[int, tuple[float, int]] | None = None,
    ) -> None:
        self.route, self.epoch, self.start, self.id = route, epoch, start, id
        self.past = dict(past or {})
        self.arms: list[str] = []
        self.totals: list[Totals] = []
        self.users = Users()
        self.balance = Balance()
        self.looks = Looks()
        self.uncounted = 0
        """Trials of users that there was no room for."""
        self.moved = False
        """Whether users were assigned at random by different weights."""
        self.weights: Mapping[str, float] = {}
        """By which the last one was."""

    def arm(self, name: str) -> int:
        """Its index."""
        if name not in self.arms:
            self.arms.append(name)
            self.totals.append(Totals())
        return self.arms.index(name)

    def add(self, trial: Trial, user: int | None, *, room: bool = True) -> tuple[Counts, int]:
        """user: its key, None for nobody. room: for one that is new. -> what the trial counts for,
        and the index of the user, -1 for none."""
        arm = self.arm(trial.arm)
        totals = self.totals[arm]
        totals.shadow = trial.shadow
        totals.add(trial)
        if user is None or not (trial.weights or trial.shadow):
            totals.anonymous += 1
            return Counts.NOTHING, -1
        i = self.users.index.get(user, -1)
        if i < 0 and not room:
            self.uncounted += 1
            return Counts.NOTHING, -1
        shadow, random = trial.shadow, _random(trial.weights)
        new = i < 0
        if new:
            i = self.users.add(user)
        row = self.users.row(i)
        if new:
            row["arm"], row["first"], row["met"] = arm, trial.at, _SHADOW * shadow
            if self.past:
                row["before_sum"], row["before_n"] = self.past.pop(user, (0.0, 0))
        met = row["met"]
        if random and not shadow and not met & _RANDOMIZED:
            self._randomize(row, arm, trial, new)
            met = _RANDOMIZED
        if row["arm"] != arm:
            row["met"] |= _CROSSED
            return Counts.NOTHING, i
        _meet(row, trial)
        if shadow:
            return Counts.NOTHING, i
        return Counts.EXPERIMENT if met & _RANDOMIZED else Counts.BEFORE, i

    def _randomize(self, row: Any, arm: int, trial: Trial, new: bool) -> None:
        """It was not in the experiment so far; what came of it is from before."""
        if not new:
            row["before_sum"] += row["sum"]
            row["before_n"] += row["n"]
            for name in ("requests", "seconds", "first_token", "tokens", "sum", "n", "negative"):
                row[name] = 0
            row["arm"], row["first"] = arm, trial.at
        row["met"] = _RANDOMIZED
        self.balance.add(trial.arm, trial.weights)
        if self.weights != trial.weights:
            self.moved = self.moved or bool(self.weights)
            self.weights = dict(trial.weights)

    def counts_for(self, user: int) -> Counts:
        """What feedback that is given now on a user who is here counts for."""
        row = self.users.row(self.users.index[user])
        return Counts.EXPERIMENT if row["met"] & _RANDOMIZED else Counts.BEFORE

    def reward(self, user: int, counts: Counts, reward: float, times: int) -> None:
        """Give a reward to a user who is here, or take it back with times = -1."""
        row = self.users.row(self.users.index[user])
        before = counts is Counts.BEFORE and row["met"] & _RANDOMIZED
        total, n = ("before_sum", "before_n") if before else ("sum", "n")
        row[n] += times
        row[total] = row[total] + times * reward if row[n] else 0.0
        if not before:
            row["negative"] += times * (reward < 0)

    def remember(self, past: Mapping[int, tuple[float, int]]) -> None:
        """Rewards from before the epoch, as in `past`, of users who may be here."""
        for user, (total, n) in past.items():
            i = self.users.index.get(user, -1)
            if i < 0:
                known, times = self.past.get(user, (0.0, 0))
                self.past[user] = (known + total, times + n)
            else:
                row = self.users.row(i)
                row["before_n"] += n
                row["before_sum"] = row["before_sum"] + total if row["before_n"] else 0.0

    def before_next(self) -> dict[int, tuple[float, int]]:
        """The rewards that were given before users were assigned at random: `past` of the route's
        next book."""
        rows = self.users.rows
        alone = (rows["met"] & Met.RANDOMIZED) == 0
        total = rows["before_sum"] + np.where(alone, rows["sum"], 0.0)
        n = rows["before_n"] + np.where(alone, rows["n"], 0)
        some = n > 0
        users = rows["user"][some].tolist()
        found = zip(total[some].tolist(), n[some].tolist(), strict=True)
        rest = {user: past for user, past in self.past.items() if past[1]}
        return {**rest, **dict(zip(users, found, strict=True))}

    def erase(self, user: int) -> int:
        """As if nothing were known of the user. Sums in which nobody can be told from others stay:
        the arms' totals, the balance of the assignments, the history. -> as `Users.erase`."""
        self.past.pop(user, None)
        return self.users.erase(user)

    def shadows(self) -> set[str]:
        """Names of the arms that ran in the shadow of answers."""
        pairs = zip(self.arms, self.totals, strict=True)
        return {arm for arm, totals in pairs if totals.shadow}

    def randomized(self) -> bool:
        """Whether any user was assigned at random."""
        return bool(self.balance.found)

    async def samples(self) -> dict[str, Sample]:
        """The rewards of each arm that answers, of the users that a report is of."""
        found: dict[str, list[Numbers]] = {}
        random = self.randomized()
        async for page in self.users.pages():
            for arm, rows in self._by_arm(page, random):
                found.setdefault(arm, []).append(values(rows))
        return {
            arm: sample(np.concatenate(found[arm])) if arm in found else sample(NONE)
            for arm, totals in zip(self.arms, self.totals, strict=True)
            if not totals.shadow
        }

    async def look(self, at: float) -> None:
        """Keep a point of the history if it is time."""
        if self.looks.begin(at):
            try:
                self.looks.keep(at, await self.samples())
            finally:
                self.looks.begun = False

    async def tallies(self, limits: Mapping[str, float]) -> Tallies:
        """Of the users that a report is of. limits: for `met`."""
        users: Counter[str] = Counter()
        happened: dict[str, Counter[str]] = {}
        rewards: dict[str, list[Numbers]] = {}
        random = self.randomized()
        async for page in self.users.pages():
            for arm, rows in self._by_arm(page, random):
                users[arm] += len(rows)
                happened.setdefault(arm, Counter()).update(met(rows, limits))
                rewards.setdefault(arm, []).append(values(rows))
        arms = {
            arm: Tally(users[arm], dict(happened[arm]), sample(np.concatenate(rewards[arm])))
            for arm in rewards
        }
        return Tallies(arms, self.balance.anytime_p_value)

    def _by_arm(self, rows: Rows, random: bool) -> Iterator[tuple[str, Rows]]:
        """random: only those of a report in which users were assigned at random."""
        if random:
            rows = drawn(rows)
        for i, arm in enumerate(self.arms):
            yield arm, rows[rows["arm"] == i]


def drawn(rows: Rows) -> Rows:
    """The users that were assigned at random, and those of shadows."""
    found: Rows = rows[(rows["met"] & (Met.RANDOMIZED | Met.SHADOW)) > 0]
    return found


def met(rows: Rows, limits: Mapping[str, float]) -> dict[str, int]:
    """How many users met with what each metric counts. limits: of ``slow``, ``slow_first_token``
    (seconds) and ``long`` (tokens): a user met with it if any answer was above. Without a limit
    those count that the trials said were above theirs."""
    found = {
        flag.name.lower(): int(np.count_nonzero(rows["met"] & flag))
        for flag in Met
        if flag.name and flag < Met.RANDOMIZED
    }
    found["negative_feedback"] = int(np.count_nonzero(rows["negative"]))
    for metric, column in (
        ("slow", "seconds"),
        ("slow_first_token", "first_token"),
        ("long", "tokens"),
    ):
        if metric in limits:
            found[metric] = int(np.count_nonzero(rows[column] > limits[metric]))
    return found


def values(rows: Rows) -> Numbers:
    """The mean reward of each user with one. -> (rewarded users,)"""
    rewarded = rows[rows["n"] > 0]
    return np.asarray(rewarded["sum"] / rewarded["n"], np.float64)


def sample(values: Numbers) -> Sample:
    """values: (n,). Of none, and the variance of one, are 0."""
    if not len(values):
        return Sample(0, 0.0, 0.0)
    return Sample(
        len(values), float(values.mean()), float(values.var(ddof=min(1, len(values) - 1)))
    )


def _random(weights: Mapping[str, float]) -> bool:
    return sum(weight > 0 for weight in weights.values()) > 1


def _meet(row: Any, trial: Trial) -> None:
    answered = trial.ended is Ended.ANSWERED
    row["met"] |= (
        _ERROR * (trial.ended is Ended.ERROR)
        | _REFUSAL * trial.refusal
        | _EMPTY * trial.empty
        | _SLOW * trial.slow
        | _SLOW_FIRST_TOKEN * trial.slow_first_token
        | _LONG * trial.long
    )
    row["requests"] += 1
    if answered:
        row["seconds"] = max(row["seconds"], trial.seconds)
        row["first_token"] = max(row["first_token"], trial.first_token)
        row["tokens"] = max(row["tokens"], trial.longest)
