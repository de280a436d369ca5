"""Exact match with greedy decoding, in plain transformers (and PEFT)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

MAX_ANSWER = 16


@torch.inference_mode()
def answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str], limit: int = MAX_ANSWER
) -> list[str]:
    """Greedy answers, each ended by EOS or after `limit` tokens. Prompts of one length share a
    batch, so that no padding is involved."""
    groups: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for text in dict.fromkeys(prompts):
        ids = tokenizer(text)["input_ids"]
        groups[len(ids)].append((text, ids))
    found: dict[str, str] = {}
    for length, group in groups.items():
        ids = torch.tensor([ids for _, ids in group])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        found.update(zip([text for text, _ in group], new, strict=True))
    return [found[text] for text in prompts]


def accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, examples: list[tuple[str, str]]
) -> float:
    """Share of (prompt, answer) pairs answered exactly."""
    given = answers(model, tokenizer, [question for question, _ in examples])
    right = sum(a == b for a, (_, b) in zip(given, examples, strict=True))
    return right / len(examples)
