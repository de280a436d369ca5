"""The process that a `helper.Helper` starts: one line of JSON in, one out, until its input ends.

The first line is what all jobs share. A job that takes more processor time than it may is ended by
the kernel, and the process with it, as is one that takes too much memory or overflows its stack,
which is a fraction of that of the server's threads.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from typing import Any

from llguidance import LLTokenizer

from deltaserve.server.confined.grammars import compiled

STACK_BYTES = 1 << 20
MEMORY_BYTES = 4 << 30


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> dict[str, Any]:
    """Compile it and compute what may come first. -> what is wrong with it, or nothing."""
    matcher = compiled(tokenizer, grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return {"error": matcher.get_error()}


def main() -> None:
    """Serve stdin until it ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    shared = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(shared["tokenizer"], eos_token=shared["eos"])
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin:
        job = json.loads(line)
        answer: dict[str, Any] = {}
        thread = threading.Thread(
            target=lambda job=job, answer=answer: answer.update(
                compile_grammar(tokenizer, job["grammar"])
            )
        )
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # nobody handles it: it ends us
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
