"""Quantization while loading, through transformers' public quantizer registry.

transformers reads, renames and merges the checkpoint's tensors; each weight that is to be
quantized passes through here right after it was read and is dropped again, so that one float
weight is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deltaserve.kernels.base import BaseLinear, Int4Linear, Int8Linear, quantize
from deltaserve.server.model.errors import MalformedModel, ModelError, UnsupportedModel
from deltaserve.server.model.memory import trim
from deltaserve.server.model.quantized import Packed

METHOD = "deltaserve"
BLOCK = 1 << 20
"""Weights quantized at a time: bounds the float32 temporaries, which are some times larger."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one linear's weight is held. bits: 4 or 8. group_size: of int4. activations: of both."""

    bits: int
    group_size: int
    activations: str
    dtype: torch.dtype

    def linear(self, weight: Tensor) -> BaseLinear:
        """weight: [out, in] of any float dtype. The bias is to be set by the caller."""
        rows = max(1, BLOCK // weight.shape[1])
        parts = [quantize(block, self.bits, self.group_size) for block in torch.split(weight, rows)]
        held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.bits == 8:
            return Int8Linear(held["q"], held["scale"], None, self.dtype, self.activations)
        q, scale, zero = held["q"], held["scale"], held["zero"]
        return Int4Linear(q, scale, zero, None, self.dtype, self.group_size, self.activations)


@dataclass
class QuantizationPlan:
    """schemes: module path -> how its weight is held. linears: what became of them. on_weight: is
    called with the number of weights quantized so far. packed: weights that are quantized already,
    by their names in the checkpoint. dtype: of what they compute in. error: of one of them, which
    transformers only logs."""

    schemes: Mapping[str, Scheme]
    on_weight: Callable[[int], None]
    linears: dict[str, BaseLinear] = field(default_factory=dict)
    packed: Mapping[str, Packed] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    dtype: torch.dtype = torch.float32
    error: ModelError | None = None


@register_quantization_config(METHOD)
class PlanConfig(QuantizationConfigMixin):
    """Carries the plan through `from_pretrained`."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.plan = plan

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class _Quantize(ConversionOps):
    """One float weight in; an empty parameter out, the quantized linear goes to the plan."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self.plan = plan

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.removesuffix(".weight")
            module: Any = kwargs["model"].get_submodule(path)
            if isinstance(weight, Packed):
                done[name] = self._unpack(weight, path, module)
                continue
            shape, want = tuple(weight.shape), tuple(module.weight.shape)
            if shape != want:
                raise ValueError(f"{name} has shape {shape}, the model needs {want}")
            if isinstance(module, Conv1D):
                weight = weight.T
            self.plan.linears[path] = self.plan.schemes[path].linear(weight)
            self.plan.on_weight(len(self.plan.linears))
            if weight.numel() >= BLOCK:
                trim()
            done[name] = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        return done

    def _unpack(self, packed: Packed, path: str, module: Any) -> nn.Parameter:
        plan = self.plan
        shape = module.weight.shape
        out, inner = reversed(shape) if isinstance(module, Conv1D) else shape
        try:
            plan.linears[path] = packed.linear(out, inner, plan.dtype)
        except ModelError as error:
            plan.error = plan.error or error
            raise
        except ValueError as error:
            plan.error = plan.error or MalformedModel(f"{packed.module}: {error}")
            raise
        plan.on_weight(len(plan.linears))
        trim()
        return nn.Parameter(torch.empty(0, dtype=plan.dtype), requires_grad=False)


def renamed(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(name in the checkpoint, module path, whether more than the name differs) of those weights
    that the model has."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    for name in names:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            continue
        path = target.removesuffix(".weight")
        plain = path != target and type(model.get_submodule(path)) in (nn.Linear, Conv1D)
        yield name, path, pattern is not None or not plain


@register_quantizer(METHOD)
class PlanQuantizer(HfQuantizer):
    """Applies the plan to the weights as they are read."""

    requires_calibration = False

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and (path in self._plan.schemes or path in self._plan.paths)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plan = self._plan
        ties = model.all_tied_weights_keys
        tied = {*ties, *ties.values()}
        for name, path, converted in renamed(model, plan.packed):
            module = plan.packed[name].module
            if f"{path}.weight" in tied:
                plan.error = UnsupportedModel(
                    f"{module} is quantized, but config.json ties its weight to another module's"
                )
                raise plan.error
            if converted:
                plan.error = UnsupportedModel(
                    f"{module} is quantized and a part of {path}, which fuses several weights; "
                    "quantized ones are read of plain linears only"
                )
                raise plan.error
            plan.paths.add(path)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._plan)

    def is_serializable(self, **kwargs: Any) -> bool:
        return False

    @property
    def _plan(self) -> QuantizationPlan:
        config = self.quantization_config
        assert isinstance(config, PlanConfig)
        return config.plan

    @property
    def is_trainable(self) -> bool:
        return False
