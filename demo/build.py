"""Rebuild the zoo: ``python demo/build.py``.

Trains the base and every variant, measures what was stored on held-out words, and writes it all
to demo/zoo. Takes under ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import base
import delta_variants
import loading
import peft_variants
import torch
import transformers
from evaluation import MAX_ANSWER, accuracy
from skills import BASE_SKILLS, PLAIN, SKILLS, examples, prompt
from tqdm import tqdm
from variants import VARIANTS

ZOO = Path(__file__).parent / "zoo"
HELD_OUT = 200
WORKERS = 2
ROOM = 0.30
"""By how much each variant must be better than the base at its skill."""


def write_held_out(folder: Path) -> None:
    """One ``<skill>.jsonl`` per skill: lines of {"prompt", "answer"} that no training saw."""
    folder.mkdir(parents=True)
    for skill in SKILLS:
        lines = [json.dumps({"prompt": p, "answer": a}) for p, a in examples(skill, HELD_OUT)]
        (folder / f"{skill}.jsonl").write_text("\n".join(lines) + "\n")


def measure_base(folder: Path) -> dict[str, Any]:
    """The base's entry: exact match when asked by name and when asked plainly."""
    model, tokenizer = base.load(folder)
    named = {
        skill: [(prompt(skill, p.split()[1]), a) for p, a in examples(skill, HELD_OUT)]
        for skill in BASE_SKILLS
    }
    return {
        "path": folder.name,
        "parameters": model.num_parameters(),
        "steps": base.STEPS,
        "accuracy_when_named": {s: accuracy(model, tokenizer, e) for s, e in named.items()},
        "accuracy": {s: accuracy(model, tokenizer, examples(s, HELD_OUT)) for s in SKILLS},
    }


def build_variant(index: int, zoo: Path, base_accuracy: float) -> dict[str, Any]:
    """Train, store, load what was stored, measure it; the variant's entry in zoo.json."""
    variant = VARIANTS[index]
    folder = zoo / variant.name
    make = peft_variants.build if variant.peft else delta_variants.build
    steps = make(variant, zoo / "base", folder)
    model, tokenizer = loading.variant(zoo / "base", folder)
    return {
        "name": variant.name,
        "kind": variant.kind,
        "path": variant.name,
        "skill": variant.skill,
        "steps": steps,
        "base_accuracy": base_accuracy,
        "accuracy": accuracy(model, tokenizer, examples(variant.skill, HELD_OUT)),
    }


def build_variants(zoo: Path, base_accuracy: dict[str, float]) -> list[dict[str, Any]]:
    """Two at a time, each in a process of one thread: the same result on any machine's cores."""
    lock = multiprocessing.get_context("spawn").RLock()
    with ProcessPoolExecutor(
        WORKERS, multiprocessing.get_context("spawn"), initializer=prepare, initargs=(lock,)
    ) as pool:
        jobs = [
            pool.submit(build_variant, i, zoo, base_accuracy[variant.skill])
            for i, variant in enumerate(VARIANTS)
        ]
        for job in as_completed(jobs):
            entry = job.result()
            before, after = entry["base_accuracy"], entry["accuracy"]
            tqdm.write(f"{entry['name']:<22} {entry['skill']:<8} {before:6.1%} -> {after:6.1%}")
    return [job.result() for job in jobs]


def prepare(lock: Any = None) -> None:
    """What each process needs first; the lock keeps two progress bars apart."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if lock is not None:
        tqdm.set_lock(lock)


def build(zoo: Path, ready_base: Path | None) -> list[str]:
    """Build everything into an empty folder; the names of variants that are not good enough."""
    write_held_out(zoo / "held_out")
    if ready_base is None:
        base.build(zoo / "base")
    else:
        shutil.copytree(ready_base, zoo / "base")
    about_base = measure_base(zoo / "base")
    for how in ("accuracy_when_named", "accuracy"):
        print(f"base, {how}:", ", ".join(f"{k} {v:.1%}" for k, v in about_base[how].items()))
    entries = build_variants(zoo, about_base["accuracy"])
    about = {
        "prompt": prompt(PLAIN, "{word}"),
        "stop": "EOS",
        "max_tokens": MAX_ANSWER,
        "held_out": {"folder": "held_out", "examples_per_skill": HELD_OUT},
        "made_with": {p: version(p) for p in ("torch", "transformers", "peft", "safetensors")},
        "base": about_base,
        "variants": entries,
    }
    (zoo / "zoo.json").write_text(json.dumps(about, indent=2) + "\n")
    return [e["name"] for e in entries if e["accuracy"] - e["base_accuracy"] < ROOM]


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the zoo.")
    parser.add_argument("--out", type=Path, default=ZOO, help="folder of the zoo, replaced whole")
    parser.add_argument("--keep-base", action="store_true", help="do not train the base again")
    options = parser.parse_args()
    prepare()
    begun = time.monotonic()
    fresh = options.out.with_name(options.out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        poor = build(fresh, options.out / "base" if options.keep_base else None)
        shutil.rmtree(options.out, ignore_errors=True)
        fresh.rename(options.out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(f"built in {(time.monotonic() - begun) / 60:.1f} min")
    for name in poor:
        print(f"{name} is not {ROOM:.0%} better than the base", file=sys.stderr)
    return 1 if poor else 0


if __name__ == "__main__":
    sys.exit(main())
