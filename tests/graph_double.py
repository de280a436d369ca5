"""What a CUDA graph does, without a GPU: launches are recorded with their arguments, and made again
with nothing else. What the host computed stays as it was at capture; what is not launched does not
happen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltaserve.kernels.attention import gpu as attention
from deltaserve.kernels.gpu import aux, embedding, gemm, inputs, norm, rope
from deltaserve.kernels.gpu.capture import NotCapturable

ASKS = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal")
"""Operations that wait for the device, or bring numbers there from memory of the host."""
MODULES = (attention, aux, embedding, gemm, inputs, norm, rope)
"""That launch kernels."""


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[Callable[[], None]] = []
        self.launched: list[str] = []
        self.made: list[Tensor] = []
        self.off = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.off:
            return out
        name, of = func.overloadpacket.__name__, [t.device for t in _tensors((args, out))]
        if name in ASKS or (name in ("_to_copy", "copy_") and len(set(of)) > 1):
            raise NotCapturable(f"{func} cannot be captured")
        given = {_memory(t) for t in _tensors((args, kwargs))}
        fresh = [_memory(t) not in given for t in _tensors(out)]
        self.made += [t for t, new in zip(_tensors(out), fresh, strict=True) if new]
        self.tasks.append(partial(_again, func, args, kwargs, out, fresh))
        return out

    def launch(self, launch: Callable[..., None], *arguments: Any, **named: Any) -> None:
        task = partial(self._launch, launch, *arguments, **named)
        self.launched.append(arguments[0].fn.__name__)
        task()
        self.tasks.append(task)

    def _launch(self, launch: Callable[..., None], *arguments: Any, **named: Any) -> None:
        self.off = True
        launch(*arguments, **named)
        self.off = False


class RecordedCapture:
    """As `gpu.capture.CudaCapture`. poison: called before each replay; what was between inputs and
    outputs is NaN then too. replays: how many there were. launched: the kernels that the last one
    launched, in order."""

    def __init__(self, patch: pytest.MonkeyPatch, poison: Callable[[], None]) -> None:
        self._patch = patch
        self._poison = poison
        self.replays = 0
        self.launched: list[str] = []

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        recorder = Recorder()
        with self._patch.context() as patch, recorder:
            for module in MODULES:
                patch.setattr(module, "launch", partial(recorder.launch, module.launch))
            out = run()

        def replay() -> Tensor:
            self.replays += 1
            self.launched = recorder.launched
            self._poison()
            for tensor in recorder.made:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
            for task in recorder.tasks:
                task()
            return out

        return replay


def _again(func: Any, args: Any, kwargs: Any, out: Any, fresh: list[bool]) -> None:
    found = _tensors(func(*args, **kwargs))
    for old, new, own in zip(_tensors(out), found, fresh, strict=True):
        if own:
            old.copy_(new)


def _memory(x: Tensor) -> int:
    """Where it lies, on a device of its own too (apart.py)."""
    return getattr(x, "raw", x).untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
