"""A Llama checkpoint and PEFT LoRA adapters of it as GGUF files, for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def name_of(key: str) -> str:
    """GGUF's name of a checkpoint's tensor."""
    if key in OTHERS:
        return OTHERS[key]
    _, _, layer, rest = key.split(".", 3)
    return f"blk.{layer}.{PARTS[rest.removesuffix('.weight')]}.weight"


def interleaved(key: str, w: Any, config: dict[str, Any]) -> Any:
    """Rows of q and k in the order of ggml's rotary embedding: pairs, not halves."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for part, field in heads.items():
        if part in key:
            n = config[field]
            return w.reshape(n, 2, w.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(w.shape)
    return w


def write_model(folder: Path, out: Path) -> None:
    """Matrices in f16, vectors in f32."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config["vocab_size"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            w = interleaved(key, file.get_tensor(key).float().numpy(), config)
            writer.add_tensor(name_of(key), w.astype(np.float32 if w.ndim == 1 else np.float16))
    _close(writer)


def _tokenizer(writer: Any, tokenizer: dict[str, Any], vocabulary: int) -> None:
    names = {i: text for text, i in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(range(vocabulary), gguf.TokenType.NORMAL)
    for token in tokenizer["added_tokens"]:
        names[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[i] for i in range(vocabulary)])
    writer.add_token_types([kinds[i] for i in range(vocabulary)])
    # llama.cpp loads no tokenizer without any; no text is encoded
    writer.add_token_merges([f"{names[4]} {names[5]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(False)


def write_adapter(adapter: Path, model: Path, out: Path) -> None:
    """In f16, with PEFT's alpha."""
    config = json.loads((model / "config.json").read_text())
    lora = json.loads((adapter / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora["lora_alpha"]))
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            part = "lora_a" if "lora_A" in key else "lora_b"
            plain = key.removeprefix("base_model.model.")
            plain = plain.replace(".lora_A.weight", ".weight").replace(".lora_B.weight", ".weight")
            w = file.get_tensor(key).float().numpy()
            if part == "lora_b":
                w = interleaved(plain, w, config)
            w = np.ascontiguousarray(w, np.float16)
            writer.add_tensor(f"{name_of(plain)}.{part}", w)
    _close(writer)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
