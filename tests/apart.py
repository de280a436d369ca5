"""A device whose memory is apart from the host's, though it lies beside it.

Tensors of it compute what the CPU's do, with each other alone: an operation on one of them and one
of the host's raises, as a GPU's would. Kernels run in Triton's interpreter. Written for
`deltaserve.kernels.gpu`, to show that nothing is mixed up, where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from deltaserve.kernels.attention import gpu as attention
from deltaserve.kernels.gated import gpu as gates
from deltaserve.kernels.gpu import aux, device, embedding, gemm, inputs, norm, rope
from deltaserve.kernels.gpu.backend import TritonBackend

NAME = "apart"
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Mixed(RuntimeError):
    """An operation was given tensors of the host beside some of the device."""


class Apart(torch.Tensor):
    """raw: the same numbers in host memory."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Apart:
        made: Apart = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, layout=raw.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.raw = raw
        return made

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def __deepcopy__(self, memo: Any) -> Apart:
        return Apart(self.raw.clone())

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Apart({self.raw})"

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat = tree_flatten((args, kwargs or {}))[0]
        given = [x for x in flat if isinstance(x, Tensor)]
        if op not in COPIES and any(not isinstance(x, Apart) and x.dim() for x in given):
            raise Mixed(f"{op} of {[(type(x).__name__, tuple(x.shape)) for x in given]}")
        to = next((x for x in flat if isinstance(x, torch.device)), torch.device(NAME))
        found = op(*tree_map(raw_of, args), **tree_map(raw_of, kwargs or {}))
        if op is torch.ops.aten.copy_.default or _changes(op):
            return args[0]
        if to.type == "cpu":
            return found.clone() if isinstance(found, Tensor) else found
        # a view of a tensor that may have gradients is one of that kind
        inference = torch.is_inference_mode_enabled() and all(x.is_inference() for x in given)
        with torch.inference_mode(inference):
            return tree_map(lambda x: Apart(x) if isinstance(x, Tensor) else x, found)


def raw_of(value: Any) -> Any:
    """What the host computes with in its place."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.raw if isinstance(value, Apart) else value


def _changes(op: Any) -> bool:
    """Whether it changes its first argument and returns that."""
    first = op._schema.arguments[0] if op._schema.arguments else None
    return bool(
        first is not None
        and first.alias_info is not None
        and first.alias_info.is_write
        and len(op._schema.returns) == 1
    )


@cache
def register() -> None:
    """Makes the device known to torch, for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    register.library = library  # type: ignore[attr-defined]

    def empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None,
              pin_memory: Any = None, memory_format: Any = None) -> Tensor:  # fmt: skip
        return Apart(torch.zeros(size, dtype=dtype))

    def strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None,
                pin_memory: Any = None) -> Tensor:  # fmt: skip
        return Apart(torch.empty_strided(size, stride, dtype=dtype))

    def copied(given: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
        raw_of(to).copy_(raw_of(given))
        return to

    library.impl("_copy_from", copied, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", strided, "PrivateUse1")


@contextmanager
def backend() -> Iterator[TritonBackend]:
    """A TritonBackend on the device."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "default_device", lambda: torch.device(NAME, 0))
        patch.setattr(TritonBackend, "free_bytes", lambda self: 1 << 30)
        for module in (aux, embedding, gates, gemm, inputs, norm, rope, attention):
            patch.setattr(module, "launch", _launching(module.launch))
        yield TritonBackend()


def _launching(launch: Callable[..., None]) -> Callable[..., None]:
    def launched(kernel: Any, grid: Any, arguments: Any, *rest: Any, **more: Any) -> None:
        for x in arguments:
            if isinstance(x, Tensor) and not isinstance(x, Apart):
                raise Mixed(f"{kernel} is given a tensor of the host, {tuple(x.shape)}")
        launch(kernel, grid, tree_map(raw_of, arguments), *rest, **more)

    return launched
