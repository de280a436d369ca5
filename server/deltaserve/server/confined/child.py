"""The process that a `helper.Helper` starts: one line of JSON in, one out, until its input ends.

The first line says what its work is, and what all jobs share. A job that takes more processor time
than it may is ended by the kernel, and the process with it, as is one that takes too much memory or
overflows its stack, which is a fraction of that of the server's threads.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

STACK_BYTES = 1 << 20
MEMORY_BYTES = 2 << 30

Answer: TypeAlias = dict[str, Any]
Work: TypeAlias = Callable[[Mapping[str, Any]], Answer]


def grammars(shared: Mapping[str, Any]) -> Work:
    """Job: a grammar; compile it and compute what may come first. -> what is wrong, or nothing."""
    from llguidance import LLTokenizer

    from deltaserve.server.confined.grammars import compiled

    tokenizer = LLTokenizer(shared["tokenizer"], eos_token=shared["eos"])

    def compile_grammar(job: Mapping[str, Any]) -> Answer:
        matcher = compiled(tokenizer, job["grammar"])
        if not matcher.is_error():
            matcher.compute_bitmask()
        return {"error": matcher.get_error()}

    return compile_grammar


def templates(shared: Mapping[str, Any]) -> Work:
    """Job: a chat template and what it gets; render it, as transformers does, in its sandbox.
    -> the text, or what is wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(job: Mapping[str, Any]) -> Answer:
        try:
            made: Any = render_jinja_template(
                conversations=[job["messages"]],
                tools=job["tools"],
                chat_template=job["template"],
                add_generation_prompt=job["add_generation_prompt"],
                **job["variables"],
            )
        except Exception as error:  # a template may raise anything
            return {"error": str(error)[:500] or type(error).__name__}
        text: str = made[0][0]
        if len(text) > job["most"]:
            return {"error": f"it makes {len(text)} characters; at most {job['most']} can fit"}
        return {"error": "", "text": text}

    return render


WORK = {"grammars": grammars, "templates": templates}


def main() -> None:
    """Serve stdin until it ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    shared = json.loads(sys.stdin.readline())
    work = WORK[shared["work"]](shared)
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin:
        job = json.loads(line)
        answers: list[Answer] = []

        def do(job: Mapping[str, Any] = job, answers: list[Answer] = answers) -> None:
            answers.append(work(job))

        thread = threading.Thread(target=do)
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # nobody handles it: it ends us
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if not answers:
            sys.exit(1)  # out of memory
        print(json.dumps(answers[0]), flush=True)


if __name__ == "__main__":
    main()
