"""Every PEFT method in one mixed batch of the engine gives what PEFT gives alone.

Greedy tokens equal and log-probabilities within 1e-3, in float32, on the shapes of Llama and
Qwen3, with base rows between.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_methods import CASES
from rig import load_base, request, running
from variants import logits_of, make_base, open_base

from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.collector import Answer, generate
from deltaserve.server.engine.engine import Engine

TOLERANCE = 1e-3
ARCHS = ["llama", "qwen3"]
AT_ONCE = 20
"""So many different methods must have been in one step together."""


class Family:
    """A base, and one adapter of every case, on disk."""

    def __init__(self, root: Path, arch: str) -> None:
        self.folder, self.adapters = root / "base", root / "adapters"
        make_base(self.folder, arch)
        self.base = open_base(self.folder)
        for i, case in enumerate(CASES.values()):
            case.make(copy.deepcopy(self.base), self.adapters / case.name, seed=i)
        self.method = {
            name: json.loads((self.adapters / name / "adapter_config.json").read_text())[
                "peft_type"
            ]
            for name in CASES
        }

    def reference(self, name: str) -> Any:
        if not name:
            return self.base
        return CASES[name].reference(copy.deepcopy(self.base), self.adapters / name)


@pytest.fixture(scope="module", params=ARCHS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def engine(family: Family) -> Iterator[Engine]:
    room = {"max_batch_tokens": 192, "max_sequences": 4 * len(CASES)}
    with running(load_base(family.folder), [family.adapters], **room) as made:
        for case in CASES.values():
            done = made.adapters.load(
                case.name, str(family.adapters / case.name), options=case.options
            )
            done.result(timeout=120)
        yield made


def by_turns(method: Mapping[str, str]) -> list[str]:
    """One case of every method, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, str]] = []
    for name, kind in method.items():
        turns.append((seen[kind], name))
        seen[kind] += 1
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])]


def prompt_of(i: int) -> list[int]:
    generator = torch.Generator().manual_seed(100 + i)
    return torch.randint(0, 256, (9 + 7 * (i % 5),), generator=generator).tolist()


def check(answer: Answer, prompt: list[int], model: Any, what: str) -> None:
    """Given our tokens, PEFT would have chosen each of them, with the same log-probability."""
    logits = logits_of(model, [*prompt, *answer.token_ids])[len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    theirs = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    found = torch.tensor([x.logprob for x in answer.logprobs])
    assert (found - theirs).abs().max() < TOLERANCE, what
    assert (theirs > expected.max(-1).values - 1e-4).all(), what


def test_every_method_in_one_batch(
    family: Family, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [n for name in by_turns(family.method) for n in ("", name)]
    prompts = [prompt_of(i) for i in range(len(names))]
    asked = [request(p, n, max_tokens=24) for p, n in zip(prompts, names, strict=True)]
    together: list[int] = []
    run = engine._runner.run

    def counted(batch: Batch) -> Any:
        labels = {part.sequence.label for part in batch.parts}
        together.append(len({family.method[label] for label in labels if label}))
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", counted)
    answers = generate(engine, asked, timeout=300)
    assert max(together) >= AT_ONCE, f"at most {max(together)} methods in one step"
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        check(answer, prompt, family.reference(name), name or "base")


@pytest.mark.parametrize("name", CASES)
def test_each_method_changes_the_output(name: str, family: Family) -> None:
    """Otherwise the test above could not fail."""
    prompt = prompt_of(3)
    base = torch.log_softmax(logits_of(family.base, prompt), -1)
    changed = torch.log_softmax(logits_of(family.reference(name), prompt), -1)
    assert (changed - base).abs().max() > 30 * TOLERANCE
