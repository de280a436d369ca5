"""One training loop for the base and for every variant."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from skills import PLAIN, SKILLS, prompt, words
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

Batch = dict[str, Tensor]
Pair = tuple[str, str]
BATCH = 192


def pairs(skill: str, seed: int, tag: str = PLAIN) -> Iterator[Pair]:
    """(prompt, answer) pairs of a skill without end, never of a held-out word."""
    for word in words(random.Random(f"train {skill} {seed}"), test=False):
        yield prompt(tag, word), SKILLS[skill](word)


def mixed(sources: dict[str, tuple[Iterator[Pair], float]], seed: int) -> Iterator[Pair]:
    """Pairs drawn from several sources with the given weights."""
    rng = random.Random(seed)
    streams, weights = zip(*sources.values(), strict=True)
    while True:
        yield next(rng.choices(streams, weights)[0])


def batches(source: Iterator[Pair], tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Batches padded on the right; only the answer and its EOS carry a label."""
    while True:
        chosen = [next(source) for _ in range(BATCH)]
        asked = tokenizer([question for question, _ in chosen])["input_ids"]
        answered = tokenizer([answer for _, answer in chosen], add_special_tokens=False)
        rows, labels = [], []
        for question, answer in zip(asked, answered["input_ids"], strict=True):
            target = [*answer, tokenizer.eos_token_id]
            rows.append(torch.tensor(question + target))
            labels.append(torch.tensor([-100] * len(question) + target))
        padding = tokenizer.pad_token_id
        yield {
            "input_ids": nn.utils.rnn.pad_sequence(rows, True, padding),
            "labels": nn.utils.rnn.pad_sequence(labels, True, -100),
        }


def line() -> int:
    """The terminal line of this process' progress bar: worker n of a pool writes on line n - 1."""
    name = multiprocessing.current_process().name
    return int(name.rsplit("-", 1)[1]) - 1 if "-" in name else 0


def train(
    model: nn.Module,
    data: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    label: str,
    loss: Callable[[Any, Batch], Tensor] | None = None,
    weight_decay: float = 0.0,
    until: float = 2.0,
) -> int:
    """AdamW over whatever asks for gradients, learning rate warmed up, then down along a cosine;
    the number of steps taken.

    `loss` maps (model output, batch) to the loss; without it, the model's own. Training ends early
    once a share of `until` of a batch, whose words are fresh, is answered exactly.
    """
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    bar = tqdm(range(steps), f"{label:<19}", mininterval=1.0, dynamic_ncols=True, position=line())
    taken = 0
    for _ in bar:
        batch = next(data)
        output = model(**batch)
        value = output.loss if loss is None else loss(output, batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        taken += 1
        exact = exact_share(output.logits.detach(), batch["labels"])
        bar.set_postfix(loss=f"{value.item():.3f}", exact=f"{exact:.0%}", refresh=False)
        if exact >= until:
            break
    bar.close()
    model.eval()
    return taken


def exact_share(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose every label is the most likely token. logits: [rows, tokens or more,
    vocabulary], virtual tokens of a prompt first; labels: [rows, tokens]."""
    guessed = logits[:, -labels.shape[1] :].argmax(-1)[:, :-1]
    wanted = labels[:, 1:]
    return ((guessed == wanted) | (wanted == -100)).all(1).float().mean().item()
