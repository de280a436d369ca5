"""Output tokens per second of mixed batches, beside transformers + PEFT in the same run.

    python benchmarks/mixed.py --models models [--only llama-160m] [--repeat 3] [--save]

Workloads: prompts of 64 tokens, 64 new tokens, all submitted at once, greedy.
W1: 16 requests over 16 adapters. W4: 16 over 4. W2: 16 of the base. W3: one of the base. W5: 16
over 16 kinds of adapters (kinds.py), deltaserve alone: nothing else serves them together.
Every engine runs in a process of its own, by turns, after a warm-up of the same shapes; the table
shows the fastest of the repeats and its ratio to transformers (+ PEFT `adapter_names`) in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import busy_seconds, cores, machine, make_models, save
from kinds import KINDS, make_kinds
from workloads import NEW, PROMPT, Answers, adapter_folder, workload

WORKLOADS = ("W1", "W4", "W2", "W3", "W5")
ADAPTED = ("W1", "W4", "W5")
OURS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int8 activations int8": {"dtype": "bfloat16", "quantize": "int8", "activations": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
    "int4 activations int8": {"dtype": "bfloat16", "quantize": "int4", "activations": "int8"},
}
THEIRS = {"bfloat16": "bfloat16", "float32": "float32"}
OTHERS = {  # script in mixed_peers/, and the forms that were fastest for at least one workload
    "llama.cpp": ("with_llama_cpp.py", ("Q4_0",)),
    "openvino": ("with_openvino.py", ("int8", "int4")),
    "onnxruntime": ("with_onnxruntime.py", ("int4",)),
}


def folder_of(models: Path, model: str, i: int, name: str) -> Path:
    """Of adapter number i in a workload."""
    if name == "W5":
        return models / f"{model}-kinds" / KINDS[i]
    return adapter_folder(models, model, i)


# The two engines:


@contextmanager
def ours(models: Path, model: str, form: str) -> Iterator[Callable[[str, int], Answers]]:
    import torch

    from deltaserve.server.config import AdapterConfig, EngineConfig
    from deltaserve.server.engine.build import make_engine
    from deltaserve.server.engine.collector import generate
    from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams
    from deltaserve.server.model import load

    how: dict[str, Any] = dict(OURS[form])
    base = load(models / model, dtype=getattr(torch, how.pop("dtype")), **how)
    # no prefix cache: the repeats have the same prompts
    engine = make_engine(
        base,
        EngineConfig(prefix_cache=False, kv_cache_bytes=1 << 30, max_batch_tokens=1024),
        AdapterConfig(roots=(models,)),
    )
    engine.start()
    count = 0
    known: set[str] = set()

    def loaded(name: str, i: int) -> str:
        """The name of adapter number i in the workload, loaded once."""
        folder = folder_of(models, model, i, name)
        if folder.name not in known:
            engine.adapters.load(folder.name, str(folder.resolve())).result()
            known.add(folder.name)
        return folder.name

    def run(name: str, new: int) -> Answers:
        nonlocal count
        requests = []
        for ids, a in workload(name):
            count += 1
            refs = () if a is None else (AdapterRef(loaded(name, a)),)
            sampling = SamplingParams(max_tokens=new, ignore_eos=True)
            requests.append(Request(f"r{count}", tuple(ids), sampling, refs))
        return [list(answer.token_ids) for answer in generate(engine, requests)]

    try:
        yield run
    finally:
        engine.shutdown()


@contextmanager
def theirs(models: Path, model: str, form: str) -> Iterator[Callable[[str, int], Answers]]:
    """transformers' generate; with adapters, PEFT's mixed batch (`adapter_names`). The base
    workloads run before the adapters are added, so they do not pay for them."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, THEIRS[form])
    base: Any = AutoModelForCausalLM.from_pretrained(models / model, dtype=dtype).eval()
    wrapped: Any = None

    @torch.inference_mode()
    def run(name: str, new: int) -> Answers:
        nonlocal wrapped
        requests = workload(name)
        ids = torch.tensor([p for p, _ in requests])
        more: dict[str, Any] = {}
        if requests[0][1] is not None:
            if wrapped is None:
                wrapped = add_adapters(peft, base, models, model, dtype)
            more["adapter_names"] = [f"a{a}" for _, a in requests]
        out = (wrapped or base).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=3,
            **more,
        )
        return [row[PROMPT:].tolist() for row in out]

    yield run


def add_adapters(peft: Any, base: Any, models: Path, model: str, dtype: Any) -> Any:
    first, *rest = range(16)
    folder = adapter_folder(models, model, first)
    wrapped = peft.PeftModel.from_pretrained(
        base, folder, adapter_name=f"a{first}", autocast_adapter_dtype=False
    )
    for i in rest:
        wrapped.load_adapter(
            adapter_folder(models, model, i), adapter_name=f"a{i}", autocast_adapter_dtype=False
        )
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype)
    return wrapped.eval()


# One process, one engine:


def work(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    order = sorted(args.workloads.split(","), key=lambda w: w in ADAPTED)  # base first
    engine = ours if args.engine == "deltaserve" else theirs
    with engine(args.models, args.model, args.form) as run:
        for name in order:
            run(name, 2)
            before, began = busy_seconds(), time.perf_counter()
            answers = run(name, NEW)
            wall = time.perf_counter() - began
            tokens = sum(len(a) for a in answers)
            row = {
                "workload": name,
                "seconds": round(wall, 4),
                "tokens_per_second": round(tokens / wall, 1),
                "other_cpu": round(max(0.0, (busy_seconds() - before) / wall / cores()), 3),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                "answers": answers,
            }
            print(json.dumps(row), flush=True)


# All of them, by turns:


def measure(args: argparse.Namespace, model: str, engine: str, form: str) -> list[dict[str, Any]]:
    workloads = [w for w in args.workloads.split(",") if w != "W5" or engine == "deltaserve"]
    if not workloads:
        return []
    if engine in OTHERS:
        script = Path(__file__).parent / "mixed_peers" / OTHERS[engine][0]
        command = [dict(args.other)[engine], str(script)]
    else:
        command = [sys.executable, __file__, "--worker", "--engine", engine]
    command += ["--models", str(args.models), "--model", model, "--form", form]
    command += ["--workloads", ",".join(workloads), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{engine} {form} on {model} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [{"model": model, "engine": engine, "form": form, **row} for row in rows]


def agreement(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Mean number of leading tokens equal to transformers' own in float32, if that was run."""
    answers = {(r["model"], r["workload"]): r["answers"] for r in reference}
    for row in rows:
        expected = answers.get((row["model"], row["workload"]))
        if expected is not None:
            lengths = [
                next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), NEW)
                for a, b in zip(row["answers"], expected, strict=True)
            ]
            row["same_prefix"] = round(sum(lengths) / len(lengths), 1)


def table(rows: list[dict[str, Any]], model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    chosen = WORKLOADS
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["engine"], row["form"], row["workload"])
        if row["model"] == model and row["seconds"] < best.get(key, {"seconds": 1e9})["seconds"]:
            best[key] = row
    shown = Table(title=f"{model}: output tokens/s (times transformers bfloat16) [same prefix]")
    for column in ("engine", "form", *chosen):
        shown.add_column(column)
    for engine, form in dict.fromkeys((e, f) for e, f, _ in best):
        cells = []
        for w in chosen:
            row = best.get((engine, form, w))
            peer = best.get(("transformers", "bfloat16", w))
            ratio = f" ({peer['seconds'] / row['seconds']:.2f}x)" if row and peer else ""
            same = f" [{row['same_prefix']}]" if row and "same_prefix" in row else ""
            cells.append(f"{row['tokens_per_second']:.0f}{ratio}{same}" if row else "-")
        shown.add_row(engine, form, *(c.replace("[", "\\[") for c in cells))
    Console(width=150).print(shown)


def other_engine(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in OTHERS or not python:
        raise argparse.ArgumentTypeError(f"{text}: NAME=PYTHON, NAME one of {', '.join(OTHERS)}")
    return name, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", default="llama-160m")
    parser.add_argument("--forms", default=",".join(OURS))
    parser.add_argument("--peers", default=",".join(THEIRS))
    parser.add_argument(
        "--other",
        type=other_engine,
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"another engine ({', '.join(OTHERS)}) and an interpreter that has it; repeatable",
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    models = args.only.split(",")
    make_models(args.models, models)
    if "W5" in args.workloads.split(","):
        for model in models:
            make_kinds(args.models, model)
    rows: list[dict[str, Any]] = []
    for model in models:
        for _ in range(args.repeat):
            for form in filter(None, args.peers.split(",")):
                rows += measure(args, model, "transformers", form)
            for form in filter(None, args.forms.split(",")):
                rows += measure(args, model, "deltaserve", form)
            for other, _ in args.other:
                for form in OTHERS[other][1]:
                    rows += measure(args, model, other, form)
    exact = [r for r in rows if (r["engine"], r["form"]) == ("transformers", "float32")]
    agreement(rows, exact)
    for model in models:
        table(rows, model)
    for row in rows:
        del row["answers"]
    if args.save:
        save(rows, "mixed.jsonl")
    print(json.dumps({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
