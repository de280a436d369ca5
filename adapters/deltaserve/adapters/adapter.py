"""Adapter: one variant of the base, lowered to primitives, in host memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from deltaserve.kernels.primitives import (
    AnyPrefix,
    Primitive,
    look,
    tensors,
    without_content,
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Immutable once made; the digest names its content.

    digest: sha256 (hex) over the config and every tensor's name, dtype, shape and bytes as they
    are in the files, so two copies of the same files are the same adapter, under any name.
    format: what it was read as, e.g. ``peft-lora``. modules: module path of the base -> its
    primitives. prefix: virtual tokens before the prompt, or prompts beside it. invocation: token
    ids whose last occurrence in the prompt activates the adapter, from their first token on
    (activated LoRA); empty for one that is always active. source_bytes: size of the tensor files.
    notes: facts an operator should see (e.g. "PiSSA converted to rank 32").
    """

    digest: str
    format: str
    modules: Mapping[str, tuple[Primitive, ...]]
    prefix: AnyPrefix | None = None
    invocation: tuple[int, ...] = ()
    source_bytes: int = 0
    base_fingerprint: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def primitives(self) -> tuple[str, ...]:
        """Names of the primitives it is made of, sorted, e.g. ``("LowRank", "Scale")``."""
        names = {type(p).__name__ for group in self.modules.values() for p in group}
        if self.prefix is not None:
            names.add(type(self.prefix).__name__)
        return tuple(sorted(names))

    def without_content(self) -> Adapter:
        """What it is made of, with no memory held: enough to decide what it combines with. What
        looks the same is one object: they are few, whatever the number of modules."""
        made: dict[Hashable, Primitive] = {}

        def outline(primitive: Primitive) -> Primitive:
            found = made.get(key := look(primitive))
            if found is None:
                found = made[key] = without_content(primitive)
            return found

        return replace(
            self,
            modules={name: tuple(map(outline, group)) for name, group in self.modules.items()},
            prefix=None if self.prefix is None else without_content(self.prefix),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as lowered; one that several modules share is counted once."""
        found = [p for group in self.modules.values() for p in group]
        held = [
            t for p in (*found, *([] if self.prefix is None else [self.prefix])) for t in tensors(p)
        ]
        sizes = {(t.data_ptr(), t.numel() * t.element_size()) for t in held}
        return sum(size for _, size in sizes)
