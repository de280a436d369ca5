"""The tensors of a quantized checkpoint as transformers' loader takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deltaserve.adapters.checkpoint import Checkpoint, open_files
from deltaserve.adapters.safetensors_header import BASE_DTYPES
from deltaserve.server.model.quantized.format import Format
from deltaserve.server.model.quantized.packed import Packed


@contextmanager
def state_dict(folder: Path, stored: Format) -> Iterator[dict[str, Any]]:
    """Name -> tensor, not read yet; instead of the tensors that a packed module has, one `Packed`
    under the name of its weight. The files stay open as long as the ``with`` lasts."""
    with ExitStack() as stack:
        fds = stack.enter_context(open_files(folder, ("model",)))
        checkpoint = Checkpoint(folder, fds, BASE_DTYPES)
        files: dict[str, Any] = {}
        for path in fds:
            opened = stack.enter_context(safe_open(path, framework="pt"))
            files.update(dict.fromkeys(opened.keys(), opened))
        state: dict[str, Any] = {name: file.get_slice(name) for name, file in files.items()}
        for module, parts in stored.modules(checkpoint.entries).items():
            reads = {}
            for part in parts:
                name = f"{module}.{part}"
                reads[part] = partial(files[name].get_tensor, name)
                del state[name]
            state[f"{module}.weight"] = Packed(module, reads, stored.linear)
        yield state
