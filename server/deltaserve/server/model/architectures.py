"""Which architectures are served without asking: those that the test matrix compares with plain
transformers, request by request (tests/archs.py has a small configuration of each)."""

from __future__ import annotations

from transformers import PreTrainedConfig

from deltaserve.server.model.errors import UnsupportedModel

TESTED = frozenset(
    [
        "afmoe",
        "apertus",
        "arcee",
        "bitnet",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "laguna",
        "llama",
        "minimax_m2",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "youtu",
    ]
)
"""Values of `model_type`."""

ATTENTIONS = frozenset({"full_attention", "sliding_attention"})
"""Layer types whose only state is keys and values per token."""


def check(config: PreTrainedConfig, *, allow_untested: bool = False) -> None:
    """Raises UnsupportedModel for what config.json alone rules out."""
    text = config.get_text_config()
    if not allow_untested and config.model_type not in TESTED:
        raise UnsupportedModel(
            f"model_type {config.model_type!r} is not among the tested architectures: "
            f"{', '.join(sorted(TESTED))}; it can be tried with --allow-untested"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type!r} is an encoder-decoder model")
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTIONS)
    if odd:
        raise UnsupportedModel(
            f"config.json: layer_types has {odd}; only layers of {sorted(ATTENTIONS)} are served"
        )
