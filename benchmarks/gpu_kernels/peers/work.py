"""What a peer gives back: calls to time, and how to see whether they are right."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor


class AbsentError(RuntimeError):
    """A peer that cannot be run here; the message is the reason."""


@dataclass(frozen=True)
class Work:
    """calls[i](): runs on copy i of the weights and returns y [tokens, out_features].
    reset(): makes y what it has to be before a call (a call may add to it).
    nbytes: of one copy of the weights as held."""

    calls: Sequence[Callable[[], Tensor]]
    reset: Callable[[], object]
    nbytes: int


def carried(folder: Path, name: str) -> Path:
    """Raises AbsentError if the peer's folder is not there."""
    found = folder / name
    if not found.is_dir():
        raise AbsentError(f"{found.name} is not in {folder.name}")
    return found


def load(folder: Path, package: str, module: str) -> ModuleType:
    """Imports package.module with `folder/package` as the package, whose own `__init__` is run only
    if it has one and nothing stands in for it. Raises AbsentError with what the import said."""
    carried(folder, package.split(".")[0])
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.{module}" if module else package)
    except Exception as error:
        raise AbsentError(f"import of {package}.{module}: {error!r}") from error


def stand_in(name: str, contents: Mapping[str, Any], path: Path | None = None) -> ModuleType:
    """A module put in place of one of the peer's own; with a path it is a package, whose other
    modules are found there."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # others ask whether it can be imported
    for key, value in contents.items():
        setattr(module, key, value)
    if path is not None:
        module.__path__ = [str(path)]
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)
    return module
