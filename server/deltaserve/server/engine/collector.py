"""Collector: an outbox for callers in the same process that want whole answers."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from deltaserve.server.engine.core import Output, Request, TokenDisagreement, TokenLogprob
from deltaserve.server.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Answer:
    """All of one request's outputs, put together; `last` is the one that ended it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    last: Output
    disagreements: tuple[TokenDisagreement, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Collector:
    def __init__(self) -> None:
        self._outputs: dict[str, list[Output]] = defaultdict(list)
        self._ended: set[str] = set()
        self._changed = threading.Condition()

    def deliver(self, outputs: list[Output]) -> None:
        with self._changed:
            for output in outputs:
                self._outputs[output.request_id].append(output)
                if output.finish_reason is not None:
                    self._ended.add(output.request_id)
            self._changed.notify_all()

    def wait(self, request_id: str, timeout: float | None = None) -> Answer:
        """The answer, or the request's error raised. TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: request_id in self._ended, timeout):
                raise TimeoutError(f"request {request_id} is not done after {timeout} s")
            outputs = self._outputs.pop(request_id)
            self._ended.discard(request_id)
        last = outputs[-1]
        if last.error is not None:
            raise last.error
        return Answer(
            "".join(o.text for o in outputs),
            tuple(t for o in outputs for t in o.token_ids),
            tuple(p for o in outputs for p in o.logprobs),
            last,
            tuple(d for o in outputs for d in o.disagreements),
            tuple(p for o in outputs for p in o.prompt_logprobs),
        )


def generate(
    engine: Engine, requests: Iterable[Request], timeout: float | None = None
) -> list[Answer]:
    """Submit all, wait for all; answers in the order of the requests."""
    collector = Collector()
    asked = list(requests)
    for request in asked:
        engine.submit(request, collector)
    return [collector.wait(r.request_id, timeout) for r in asked]
