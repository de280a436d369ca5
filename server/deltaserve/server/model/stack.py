"""All layers of a model in one native call, for the steps that need nothing else: one token each of
sequences, of the base and of adapters that the native kernels serve. The kernels are those that the
layers call one by one."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.attention.cpu_step import CpuStep
from deltaserve.kernels.linear import LinearDeltas
from deltaserve.kernels.native import library
from deltaserve.kernels.native.pointers import entries
from deltaserve.kernels.native.stack import NativeGroup, NativeLayer, NativeNorm
from deltaserve.server.model.context import ForwardContext, KVStore
from deltaserve.server.model.fused_layer import FusedLayer
from deltaserve.server.model.norm import DeltaNorm


class FusedStack:
    """layers: each is given what the one before it returns. natives: their linears, in order.
    not_native: slots whose adapters the layers must serve one by one."""

    def __init__(
        self,
        ctx: ForwardContext,
        layers: Sequence[FusedLayer],
        natives: Sequence[NativeGroup],
        not_native: Set[int],
    ) -> None:
        self.ctx = ctx
        self.not_native = not_native
        self.layers = tuple(layers)
        self.done: Tensor | None = None
        """What the layers after the first are given when it has computed them all."""
        self._natives = natives
        self._kv: KVStore | None = None
        self._structures: Any = None

    @classmethod
    def of(
        cls, ctx: ForwardContext, layers: Sequence[FusedLayer], not_native: Set[int]
    ) -> FusedStack | None:
        """None if a linear cannot be called natively."""
        natives = []
        for layer in layers:
            for group in (layer.qkv, layer.o, layer.up, layer.down):
                native = group.base.native()
                if native is None or not isinstance(group.deltas, LinearDeltas):
                    return None
                natives.append(group.deltas.native(native))
        return cls(ctx, layers, natives, not_native)

    def start(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """The first layer's output, or the last one's, which then is `done` as well."""
        self.done = None
        step, kv = self.ctx.attention, self.ctx.kv
        assert isinstance(step, CpuStep) and kv is not None
        slots = self.ctx.segments.slots
        one_by_one = not (
            slots.isdisjoint(self.not_native) and slots.isdisjoint(self.ctx.gated_prefixes.slots)
        )
        if step.chunks or one_by_one:
            return self.layers[0](x, position_embeddings=rotation)
        self.done = self._run(x, rotation, step, kv)
        return self.done

    def _run(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], step: CpuStep, kv: KVStore
    ) -> Tensor:
        """x: [1, T, hidden] -> the same."""
        lib = library()
        assert lib is not None
        if kv is not self._kv:
            self._kv, self._structures = kv, self._fill(kv)
        x = x.clone(memory_format=torch.contiguous_format)
        cosine, sine = (r.contiguous() for r in rotation)
        failed = lib["ds_layers"](
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            x.shape[1],
            self._structures,
            len(self.layers),
            entries(self.ctx.segments) if self.ctx.segments else None,
            cosine.data_ptr(),
            sine.data_ptr(),
            cosine.shape[-1],
            step.cells.data_ptr(),
            step.tables.data_ptr(),
            step.tables.shape[1],
            kv.block_size,
            step.lengths_tensor.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for a step's intermediate values")
        return x

    def _fill(self, kv: KVStore) -> Any:
        made = (NativeLayer * len(self.layers))()
        for i, (layer, native) in enumerate(zip(self.layers, made, strict=True)):
            native.qkv, native.o, native.up, native.down = self._natives[4 * i : 4 * i + 4]
            native.first, native.second = (_norm(norm) for norm in (layer.first, layer.second))
            native.keys = kv.keys[layer.layer_idx].data_ptr()
            native.values = kv.values[layer.layer_idx].data_ptr()
            native.heads, native.kv_heads, native.dim = layer.heads, layer.kv_heads, layer.dim
            native.scale = layer.how.scale
            native.window, native.softcap = layer.how.window or 0, layer.how.softcap or 0.0
        return made


def _norm(norm: DeltaNorm) -> NativeNorm:
    assert norm.offset is not None
    return NativeNorm(
        norm.gain.data_ptr(),
        norm.weight.data_ptr(),
        norm.offset,
        norm.eps,
        norm.deltas.pointers.address,
    )


class StackedLayer:
    """Stands for one layer's forward."""

    def __init__(self, stack: FusedStack, index: int) -> None:
        self.stack = stack
        self.index = index
        self.last = index == len(stack.layers) - 1

    def __call__(
        self, x: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any
    ) -> Tensor:
        """x: [1, T, hidden] -> the same."""
        stack = self.stack
        if self.index == 0:
            return stack.start(x, position_embeddings)
        if stack.done is None:
            return stack.layers[self.index](x, position_embeddings=position_embeddings)
        if self.last:
            stack.done = None
        return x
