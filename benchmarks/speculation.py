"""Output tokens per second with and without prompt-lookup speculation, in one process by turns.

    python benchmarks/speculation.py --models models [--forms bfloat16,int8] [--repeat 3] [--save]

The model has a real shape, and its head is made so that each token is followed by its successor in
a cycle of 96, which makes the workloads exact and costs what the shape costs:

copy        greedy; the prompt holds what the answer says, so every lookup is right
edit        seeded sampling that leaves the copied text for another place of it now and then
fresh       greedy; nothing in the prompt occurs in the answer: no lookup finds anything
misleading  greedy; every two tokens of the answer stand in the prompt before a wrong third

Each for the base and for one adapter a request, one request and sixteen. The prompts are in the
prefix cache, so what is timed is decoding. The fastest of the repeats counts; `ratio` is the speed
with drafts to that without.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from mixed import OURS, cores, machine
from models import SHAPES, make_adapters
from transformers import LlamaConfig, LlamaForCausalLM

from deltaserve.server.config import AdapterConfig, EngineConfig
from deltaserve.server.engine.build import make_engine
from deltaserve.server.engine.collector import Answer, generate
from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams, Speculation
from deltaserve.server.engine.engine import Engine
from deltaserve.server.model import load

CYCLE, NEW, ADAPTERS = 96, 64, 16
FIRST = 260
"""Ids below are bytes and special tokens."""
WORKLOADS = ("copy", "edit", "fresh", "misleading")
COUNTS = (1, 16)


def cycles(vocabulary: int) -> list[list[int]]:
    ids = list(range(FIRST, vocabulary))
    random.Random(0).shuffle(ids)
    return [ids[i : i + CYCLE] for i in range(0, len(ids) - CYCLE + 1, CYCLE)]


def make(folder: Path, shape: str) -> None:
    """A random model whose embedding outweighs its layers, and whose head looks for the token
    that was read and gives the logit to its successor; with adapters."""
    config = LlamaConfig(
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        **{**SHAPES[shape], "tie_word_embeddings": False},
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" not in key:
                std = 4.0 if "embed" in key else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std)
        head = model.lm_head.weight.mul_(0.02 * config.hidden_size**0.5)
        for cycle in cycles(config.vocab_size):
            after = torch.tensor([*cycle[1:], cycle[0]])
            read = model.model.embed_tokens.weight[torch.tensor(cycle)].float()
            head[after] = (0.02 * torch.nn.functional.normalize(read) * read.shape[1] ** 0.5).to(
                head.dtype
            )
    model.save_pretrained(folder / "base")
    byte_tokenizer(config.vocab_size).save_pretrained(folder / "base")
    make_adapters(model, folder / "lora", shape, ADAPTERS)


def prompt(workload: str, mine: list[int], others: list[int]) -> list[int]:
    """The answer goes on in the cycle `mine` behind the prompt's last token."""
    if workload in ("copy", "edit"):
        return [*mine, *mine[:32]]
    if workload == "fresh":
        return [*others[:127], mine[0]]
    wrong = [x for (a, b), c in zip(pairwise(mine), others, strict=False) for x in (a, b, c)]
    return [*wrong, mine[0]]


def requests(workload: str, count: int, adapters: bool, draft: int) -> list[Request]:
    all_cycles = cycles(32000)
    made = []
    for i in range(count):
        mine, others = all_cycles[2 * i], [*all_cycles[2 * i + 1], *all_cycles[-1 - i]]
        how: dict[str, Any] = {}
        if workload == "edit":
            bias = tuple((t, 100.0) for t in sorted(mine))
            how = {"temperature": 2.0, "seed": i, "logit_bias": bias}
        made.append(
            Request(
                f"{time.monotonic_ns()}",
                tuple(prompt(workload, mine, others)),
                SamplingParams(max_tokens=NEW, ignore_eos=True, **how),
                (AdapterRef(f"a{i:02d}"),) if adapters else (),
                speculation=Speculation(draft),
            )
        )
    return made


@contextmanager
def serving(folder: Path, form: str) -> Iterator[Engine]:
    how: dict[str, Any] = dict(OURS[form])
    model = load(folder / "base", dtype=getattr(torch, how.pop("dtype")), **how)
    engine = make_engine(
        model, EngineConfig(kv_cache_bytes=1 << 30), AdapterConfig(roots=(folder,))
    )
    engine.start()
    try:
        for i in range(ADAPTERS):
            name = f"a{i:02d}"
            engine.adapters.load(name, str((folder / "lora" / name).resolve())).result()
        yield engine
    finally:
        engine.shutdown()


def timed(engine: Engine, asked: list[Request]) -> tuple[float, list[Answer]]:
    began = time.perf_counter()
    answers = generate(engine, asked)
    return time.perf_counter() - began, answers


def compare(
    engine: Engine, workload: str, count: int, adapters: bool, draft: int, repeat: int
) -> dict[str, Any]:
    """One row. Rounding differs with the shape of a batch, so in bfloat16 a near tie may be broken
    the other way: `same` is the share of answers that are equal token by token."""
    best = {0: float("inf"), draft: float("inf")}
    answers: dict[int, list[Answer]] = {}
    generate(engine, requests(workload, count, adapters, draft))  # the prefix cache has the prompts
    for turn in range(2 * repeat):
        drafts = (0, draft)[(turn + turn // 2) % 2]  # a b b a
        seconds, answers[drafts] = timed(engine, requests(workload, count, adapters, drafts))
        best[drafts] = min(best[drafts], seconds)
    used = [a.last.usage for a in answers[draft] if a.last.usage is not None]
    drafted, accepted = sum(u.drafted_tokens for u in used), sum(u.accepted_tokens for u in used)
    equal = [a.token_ids == b.token_ids for a, b in zip(answers[0], answers[draft], strict=True)]
    return {
        "workload": workload,
        "requests": count,
        "adapters": count if adapters else 0,
        "tokens_per_second": {
            "off": round(NEW * count / best[0], 1),
            "on": round(NEW * count / best[draft], 1),
        },
        "ratio": round(best[0] / best[draft], 3),
        "drafted": drafted,
        "accepted": accepted,
        "same": round(sum(equal) / len(equal), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--shape", default="llama-160m", choices=list(SHAPES))
    parser.add_argument("--forms", default="bfloat16,int8")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--draft", type=int, default=8, help="most drafted a step")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.models / f"{args.shape}-cycle"
    if not (folder / "lora" / f"a{ADAPTERS - 1:02d}").exists():
        make(folder, args.shape)
    rows = []
    for form in args.forms.split(","):
        with serving(folder, form) as engine:
            for workload in args.workloads.split(","):
                for count in COUNTS:
                    for adapters in (False, True):
                        row = compare(engine, workload, count, adapters, args.draft, args.repeat)
                        rows.append({"model": args.shape, "form": form, "draft": args.draft, **row})
                        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if args.save:
        with (Path(__file__).parent / "results" / "speculation.jsonl").open("a") as f:
            for row in rows:
                f.write(json.dumps({**machine(), **row}) + "\n")
    print(json.dumps({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
