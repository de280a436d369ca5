"""PEFT's virtual tokens: prompt tuning, P-tuning and prefix tuning.

All three save one tensor ``prompt_embeddings`` that no longer needs the network it was trained
through: PEFT saves the prompt encoder's *output*, for prefix tuning with and without projection.
"""

from __future__ import annotations

from torch import Tensor

from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.formats.peft.fields import (
    COMMON,
    NATURAL,
    Irrelevant,
    Only,
    Rules,
    check_fields,
)
from deltaserve.adapters.lowering import Lowering
from deltaserve.kernels.primitives import PrefixKV, PromptEmbeddings

PROMPT_NAME = "peft-prompt-tuning"
P_TUNING_NAME = "peft-p-tuning"
PREFIX_NAME = "peft-prefix-tuning"
TENSOR = "prompt_embeddings"

VIRTUAL: Rules = {
    **COMMON,
    "num_virtual_tokens": NATURAL,
    "token_dim": NATURAL,
    "num_attention_heads": NATURAL,
    "num_layers": NATURAL,
    "num_transformer_submodules": Only((1, None), "2 is for encoder-decoder models"),
    "modules_to_save": Only((None, []), "not served beside virtual tokens"),
}

PROMPT_RULES: Rules = {
    **VIRTUAL,
    "prompt_tuning_init": Irrelevant("initialization"),
    "prompt_tuning_init_text": Irrelevant("initialization"),
    "tokenizer_name_or_path": Irrelevant("initialization"),
    "tokenizer_kwargs": Irrelevant("initialization"),
}

P_TUNING_RULES: Rules = {
    **VIRTUAL,
    "encoder_reparameterization_type": Irrelevant("the encoder's output is what was saved"),
    "encoder_hidden_size": Irrelevant("the encoder's output is what was saved"),
    "encoder_num_layers": Irrelevant("the encoder's output is what was saved"),
    "encoder_dropout": Irrelevant("training only"),
}

PREFIX_RULES: Rules = {
    **VIRTUAL,
    "init_weights": Irrelevant("initialization"),
    "encoder_hidden_size": Irrelevant("the encoder's output is what was saved"),
    "prefix_projection": Irrelevant("the encoder's output is what was saved"),
}


def lower_prompt(work: Lowering) -> None:
    """Prompt tuning (Lester et al. 2021): embeddings [n, hidden] before those of the prompt."""
    _check(work, PROMPT_RULES)
    work.prefix = PromptEmbeddings(_embeddings(work, work.base.hidden_size))


def lower_p_tuning(work: Lowering) -> None:
    """P-tuning (Liu et al. 2021): as prompt tuning, once the encoder has run."""
    _check(work, P_TUNING_RULES)
    work.prefix = PromptEmbeddings(_embeddings(work, work.base.hidden_size))


def lower_prefix(work: Lowering) -> None:
    """Prefix tuning (Li and Liang 2021): [n, 2 * layers * heads * size], the key of layer l at
    2 l and its value at 2 l + 1; heads are the base's key-value heads (PeftModel.get_prompt)."""
    _check(work, PREFIX_RULES)
    config, layers = work.config, work.base.layers
    heads, dim = config["num_attention_heads"], config["token_dim"]
    fits = dim % heads == 0 and all(
        (layer.kv_heads, layer.key_dim, layer.value_dim) == (heads, dim // heads, dim // heads)
        for layer in layers
    )
    if config["num_layers"] != len(layers) or not fits:
        found = sorted({(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layers})
        raise InvalidAdapter(
            f"{work.checkpoint.path}: prefix for {config['num_layers']} layers of {heads} heads "
            f"of {dim / heads:g}; the base has {len(layers)} layers with (key-value heads, key "
            f"size, value size) {found}",
            field="num_attention_heads",
        )
    flat = _embeddings(work, 2 * len(layers) * dim)
    kv = flat.view(flat.shape[0], 2 * len(layers), heads, dim // heads)
    work.prefix = PrefixKV(
        tuple(kv[:, 2 * i].contiguous() for i in range(len(layers))),
        tuple(kv[:, 2 * i + 1].contiguous() for i in range(len(layers))),
    )


def _check(work: Lowering, rules: Rules) -> None:
    check_fields(work.config, rules, str(work.checkpoint.path))
    for field in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
        if field not in work.config:
            raise InvalidAdapter(
                f"{work.checkpoint.path}: config field {field!r} is missing", field=field
            )


def _embeddings(work: Lowering, width: int) -> Tensor:
    for name in work.checkpoint.entries:
        if name != TENSOR:
            raise work.unknown_tensor(name)
    if not work.checkpoint.entries:
        raise InvalidAdapter(f"{work.checkpoint.path}: tensor {TENSOR!r} is missing", field=TENSOR)
    return work.tensor(TENSOR, [work.config["num_virtual_tokens"], width])
