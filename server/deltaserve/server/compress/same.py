"""Is the fine-tune the base with other weights, and nothing else?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from deltaserve.server.compress.errors import CompressError

HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "attn_pdrop",
        "resid_pdrop",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Config fields that do not change what the model computes from given tokens."""

BY_TENSORS = frozenset({"tie_word_embeddings"})
"""Fields that say which tensors there are, which is looked at where the tensors are paired."""

ENDS = "eos_token_id"
TEXT_FILES = ("tokenizer.json", "chat_template.jinja")


def check(base: Path, tuned: Path) -> list[str]:
    """What is served differently from the tuned model although its weights are right, in words: a
    delta has no tokens that end a text and no tokenizer of its own.

    Raises CompressError naming a config field that changes the computation.
    """
    ours, theirs = _config("--base", base), _config("--tuned", tuned)
    for field in sorted(ours.keys() | theirs.keys()):
        if field in HARMLESS | BY_TENSORS | {ENDS} or ours.get(field) == theirs.get(field):
            continue
        raise CompressError(
            f"--tuned {tuned}: config field {field!r} is {_short(theirs.get(field))}, the base has "
            f"{_short(ours.get(field))}; a delta can change weights, not what is computed with them"
        )
    notes = []
    if ours.get(ENDS) != theirs.get(ENDS):
        notes.append(
            f"the tuned model ends texts with token {theirs.get(ENDS)}, the base with "
            f"{ours.get(ENDS)}: give its own as stop tokens of the requests"
        )
    for name in TEXT_FILES:
        if _bytes(tuned / name) not in (None, _bytes(base / name)):
            notes.append(f"the tuned model's {name} differs from the base's, which is served")
    return notes


def _config(flag: str, folder: Path) -> Mapping[str, Any]:
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{flag} {folder}: config.json: {error}") from error
    content: dict[str, Any] = found.to_dict()
    if content.get("quantization_config") is not None:
        raise CompressError(
            f"{flag} {folder}: config.json has a quantization_config; what a fine-tune changed is "
            "measured on the weights that it was made from, not on quantized ones"
        )
    return content


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
