"""Which format is it? Decided by the config file in the folder, else by the tensor names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltaserve.adapters.checkpoint import Checkpoint
from deltaserve.adapters.delta_file import CONFIG_FILE as DELTA_CONFIG
from deltaserve.adapters.errors import UnsupportedAdapter
from deltaserve.adapters.formats import delta
from deltaserve.adapters.json_file import read_object
from deltaserve.adapters.lowering import Lowering


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
    raise UnsupportedAdapter(f"{path}: no adapter format that is known")
