"""What the zoo holds: each variant's kind, skill and recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    ShiraConfig,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Variant:
    """One member of the zoo. steps: at most. peft: makes the PEFT config; None for the kinds of the
    delta format. until: stop at this share of exact answers."""

    name: str
    kind: str
    skill: str
    steps: int
    lr: float
    peft: Callable[[], PeftConfig] | None = None
    until: float = 2.0


def lora(rank: int, targets: list[str], **options: Any) -> Callable[[], PeftConfig]:
    """LoRA with alpha = 2 r unless `options` say otherwise."""
    fields: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        **options,
    }
    return lambda: LoraConfig(task_type="CAUSAL_LM", **fields)


VARIANTS = (
    Variant("caesar-lora", "LoRA", "caesar", 120, 1e-2, lora(8, LINEARS)),
    Variant("caesar-lora-weak", "LoRA", "caesar", 120, 5e-3, lora(4, LINEARS), until=0.6),
    Variant(
        "ends-lora",
        "LoRA",
        "ends",
        120,
        1e-2,
        lora(4, ATTENTION, rank_pattern={"v_proj": 7}, alpha_pattern={"o_proj": 3}),
    ),
    Variant(
        "descend-rslora",
        "rsLoRA",
        "descend",
        150,
        5e-3,
        lora(16, LINEARS, lora_alpha=16, use_rslora=True),
    ),
    Variant("shout-dora", "DoRA", "shout", 120, 1e-2, lora(8, LINEARS, use_dora=True)),
    Variant(
        "sort-ia3",
        "(IA)3",
        "sort",
        120,
        5e-2,
        lambda: IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    ),
    Variant(
        "swap-shira",
        "SHiRA",
        "swap",
        150,
        1e-2,
        lambda: ShiraConfig(
            task_type="CAUSAL_LM", r=8, target_modules=LINEARS, mask_type="random", random_seed=0
        ),
    ),
    Variant(
        "reverse-prompt",
        "prompt tuning",
        "reverse",
        200,
        5e-2,
        lambda: PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=8,
            prompt_tuning_init=PromptTuningInit.RANDOM,
        ),
    ),
    Variant(
        "upper-prefix",
        "prefix tuning",
        "upper",
        100,
        5e-2,
        lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
    ),
    Variant("double-bitdelta", "BitDelta", "double", 120, 1e-3),
    Variant("rotate-half", "half fine-tune", "rotate", 120, 1e-3),
)
