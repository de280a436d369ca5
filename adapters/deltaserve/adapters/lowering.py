"""What lowering has in common: the request, the result, and the words of a refusal."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaserve.adapters.base import BaseSpec, ModuleSpec
from deltaserve.adapters.checkpoint import Checkpoint
from deltaserve.adapters.errors import BaseMismatch, UnsupportedAdapter
from deltaserve.kernels.primitives import Prefix, Primitive


@dataclass
class Lowering:
    """One adapter on its way from files to primitives.

    config: the parsed config file, empty where the format has none. modules, prefix and notes
    are filled by the format.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    base: BaseSpec
    allow_base_mismatch: bool = False
    modules: dict[str, list[Primitive]] = field(default_factory=dict)
    prefix: Prefix | None = None
    base_fingerprint: str = ""
    notes: list[str] = field(default_factory=list)

    def add(self, module: str, *primitives: Primitive) -> None:
        """Give ``module`` more primitives."""
        self.modules.setdefault(module, []).extend(primitives)

    def note(self, text: str) -> None:
        """Say something that an operator should see, once."""
        if text not in self.notes:
            self.notes.append(text)

    def module(self, name: str, tensor: str) -> ModuleSpec:
        """The base's module; `UnsupportedAdapter` naming ``tensor`` and the nearest modules."""
        if (found := self.base.modules.get(name)) is not None:
            return found
        near = difflib.get_close_matches(name, list(self.base.modules), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UnsupportedAdapter(
            f"{self.checkpoint.path}: tensor {tensor!r} is for module {name!r}, which the base "
            f"{self.base.name!r} does not have{hint}",
            field=tensor,
        )

    def unknown_tensor(self, tensor: str) -> UnsupportedAdapter:
        """The refusal of a tensor that the format does not know."""
        return UnsupportedAdapter(
            f"{self.checkpoint.path}: tensor {tensor!r} is not understood, so the adapter is "
            "refused rather than served in part",
            field=tensor,
        )

    def mismatch(self, text: str, field_name: str) -> None:
        """Made for another base: `BaseMismatch`, or a note if the caller allows it."""
        if not self.allow_base_mismatch:
            raise BaseMismatch(f"{self.checkpoint.path}: {text}", field=field_name)
        self.note(f"base mismatch allowed: {text}")
