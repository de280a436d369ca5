"""Which format is it? Decided by the config file in the folder, else by the tensor names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.adapters.checkpoint import Checkpoint
from deltaserve.adapters.delta_file import CONFIG_FILE as DELTA_CONFIG
from deltaserve.adapters.errors import UnsupportedAdapter
from deltaserve.adapters.formats import bitdelta, delta
from deltaserve.adapters.formats.peft import ia3, lora, prompts, shira
from deltaserve.adapters.json_file import read_object
from deltaserve.adapters.lowering import Lowering

PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Format:
    """A format's name, as in `Adapter.format`, and its lowering."""

    name: str
    lower: Callable[[Lowering], None]


def detect(checkpoint: Checkpoint) -> tuple[Format, dict[str, Any]]:
    """The format of an open checkpoint and its parsed config, empty where it has none."""
    path = checkpoint.path
    folder = path if path.is_dir() else path.parent
    if (folder / DELTA_CONFIG).exists():
        return Format(delta.NAME, delta.lower), read_object(folder / DELTA_CONFIG)
    if (folder / PEFT_CONFIG).exists():
        config = read_object(folder / PEFT_CONFIG)
        return _peft(path, config), config
    if bitdelta.looks_like(checkpoint):
        return Format(bitdelta.NAME, bitdelta.lower), {}
    raise UnsupportedAdapter(
        f"{path}: not an adapter that is known: neither {DELTA_CONFIG} nor {PEFT_CONFIG} is there, "
        "and no tensor is a BitDelta mask"
    )


PEFT_TYPES = {
    "LORA": Format(lora.NAME, lora.lower),
    "IA3": Format(ia3.NAME, ia3.lower),
    "SHIRA": Format(shira.NAME, shira.lower),
    "PROMPT_TUNING": Format(prompts.PROMPT_NAME, prompts.lower_prompt),
    "P_TUNING": Format(prompts.P_TUNING_NAME, prompts.lower_p_tuning),
    "PREFIX_TUNING": Format(prompts.PREFIX_NAME, prompts.lower_prefix),
}
"""What is read of peft.PeftType; every other value is refused by name."""

NAMES = (delta.NAME, bitdelta.NAME, *(f.name for f in PEFT_TYPES.values()))
"""Every format that is read."""

NAMES = (delta.NAME, bitdelta.NAME, *(form.name for form in PEFT_TYPES.values()))
"""Every format that is read."""


def _peft(path: Path, config: dict[str, Any]) -> Format:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        raise UnsupportedAdapter(
            f"{path}: config field 'peft_type' = {str(kind)[:100]!r} is not served; "
            f"known: {', '.join(PEFT_TYPES)}",
            field="peft_type",
        )
    return PEFT_TYPES[kind]
