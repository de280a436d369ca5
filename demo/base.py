"""The base of the zoo: a Llama of 0.9 million parameters that knows four skills.

It is trained on prompts that name the skill, and on plain prompts whose answers are a mixture of
the four, mostly `copy`. Asked plainly it therefore copies: every other skill is room for a variant,
be it one that the base knows but does not show (which a prompt or a few scales can bring out) or a
new one (which takes new weights).
"""

from __future__ import annotations

from pathlib import Path

import tokenizer as zoo_tokenizer
import torch
from skills import BASE_SKILLS
from training import batches, mixed, pairs, train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS = 700
TAGGED = 1.0
PLAIN_MIXTURE = {"copy": 1.6, "reverse": 0.5, "sort": 0.5, "upper": 0.5}


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Grouped-query attention, SwiGLU, untied head: a real Llama, made small."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build(folder: Path, steps: int = STEPS) -> None:
    """Train the base and write it with its tokenizer, weights in bfloat16."""
    tokenizer = zoo_tokenizer.build()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(tokenizer))
    sources = {skill: (pairs(skill, 0, tag=skill), TAGGED) for skill in BASE_SKILLS}
    for skill, weight in PLAIN_MIXTURE.items():
        sources[f"plain {skill}"] = (pairs(skill, 1), weight)
    data = batches(mixed(sources, 0), tokenizer)
    train(model, data, steps=steps, lr=4e-3, label="base", weight_decay=0.01)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The stored base in float32, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)
