"""A small random model of every architecture that is served, for the test matrix."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 16}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
ROUTED = {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MLA = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}

ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "mistral": ("mistral", WINDOW),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", {**MOE, **WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen2-moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "qwen3": ("qwen3", HEAD),
    "qwen3-moe": ("qwen3_moe", {**MOE, **HEAD}),
    "gemma": ("gemma", HEAD),
    "gemma2": ("gemma2", {**HEAD, **WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {**HEAD, **WINDOW, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **HEAD,
            **WINDOW,
            "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 256,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": None,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **HEAD,
            **WINDOW,
            "global_head_dim": 32,
            "num_hidden_layers": 6,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 256,
        },
    ),
    "vaultgemma": ("vaultgemma", {**HEAD, **WINDOW, "query_pre_attn_scalar": 16}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", WINDOW),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "phimoe": ("phimoe", MOE),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "olmoe": ("olmoe", MOE),
    "flex-olmo": ("flex_olmo", MOE),
    "granite": ("granite", {}),
    "granite-moe": ("granitemoe", MOE),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {**WINDOW, "num_hidden_layers": 4}),
    "glm": ("glm", HEAD),
    "glm4": ("glm4", HEAD),
    "glm4-moe": ("glm4_moe", {**ROUTED, **HEAD}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "helium": ("helium", HEAD),
    "exaone4": ("exaone4", WINDOW),
    "exaone-moe": ("exaone_moe", {}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5-moe": ("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2}),
    "seed-oss": ("seed_oss", HEAD),
    "hunyuan": ("hunyuan_v1_dense", HEAD),
    "hunyuan-moe": ("hunyuan_v1_moe", {**HEAD, **MOE}),
    "gpt-oss": ("gpt_oss", {**HEAD, **WINDOW, **MOE}),
    "deepseek-v2": ("deepseek_v2", {**ROUTED, **MLA, "q_lora_rank": None}),
    "deepseek-v3": ("deepseek_v3", {**ROUTED, **MLA, "q_lora_rank": 24}),
    "dots1": ("dots1", {**ROUTED, **HEAD, "sliding_window": None, "n_shared_experts": 1}),
    "minimax-m2": ("minimax_m2", {**MOE, **HEAD}),
    "nemotron": ("nemotron", {}),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-bigcode": ("gpt_bigcode", GPT2),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "persimmon": ("persimmon", {}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "nanochat": ("nanochat", {}),
    "solar-open": ("solar_open", MOE),
    "youtu": ("youtu", {"num_key_value_heads": 4}),
    "afmoe": ("afmoe", MOE),
    "hy-v3": ("hy_v3", MOE),
    "laguna": ("laguna", MOE),
}
"""Name -> (model_type, what differs from COMMON)."""


def build(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model with plain eager attention; weights large enough to matter."""
    kind, own = ARCHS[name]
    config = CONFIG_MAPPING[kind](**{**COMMON, **own})
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for path, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in path and "wte" not in path:
            torch.nn.init.normal_(parameter, std=0.08)
        elif parameter.dim() == 1:  # gains, biases and sinks: not the ones and zeros of a new model
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
