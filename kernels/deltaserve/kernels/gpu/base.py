"""GpuLinear: a base linear in the layout that gemm_kernel reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.base import words
from deltaserve.kernels.base.linear import BaseLinear, tensor_bytes
from deltaserve.kernels.base.quantize import quantize as quantize_weight
from deltaserve.kernels.gpu.config import WHOLE
from deltaserve.kernels.gpu.device import COMPUTE_DTYPES, default_device
from deltaserve.kernels.gpu.gemm import Output, choose, run_gemm
from deltaserve.kernels.gpu.inputs import run_inputs, wanted
from deltaserve.kernels.gpu.streams import to_host
from deltaserve.kernels.gpu.weights import Weights, pack_weight, unpack_weight
from deltaserve.kernels.gpu.workspace import Workspace

INT4_GROUP = 128
DEEPEST = words.ALIGN
"""Inputs of the deepest step of any kernel."""
FORMATS = ("none", "int8", "int4", "fp8")
FOUR_BITS = ("int4", "code4", "w4a8")
IN_8_BITS = {"int8": "w8a8", "int4": "w4a8"}
"""Formats that have one whose activations are 8 bits."""
WITH_ZEROS = ("int4", "uint8", "w4a8")
SHARED = ("order", "code")
"""Canonical tensors that have no rows."""


class GpuLinear(BaseLinear):
    """A base linear on the GPU; made by `make_linear` and `concat`.

    format: "dense", "int8", "uint8" (whole numbers of a byte with zeros), "int4", "code4" (codes of
    4 bits) or "fp8"; "w8a8" and "w4a8" are "int8" and "int4" that quantize each token to 8 bits,
    as `Int8Linear` does with activations "int8", and multiply whole numbers. held: the canonical
    tensors, as of the linear that the CPU would serve; "order", int64 [in], says which input each
    column of the others is for, its own if it is missing. group_size: inputs of one scale; 0, of
    bytes alone, for one scale per row. weights: what the kernels read. workspace: one of its own if
    not given.
    """

    def __init__(
        self,
        held: dict[str, Tensor],
        format: str,
        dtype: torch.dtype,
        group_size: int = 0,
        device: torch.device | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype is {dtype}; a GPU linear computes in one of {COMPUTE_DTYPES}")
        self.format = format
        self.rounds_inputs = format in WHOLE
        self.dtype = dtype
        self.device = device or default_device()
        first = held["weight"] if format == "dense" else held["q"]
        self.out_features, self.in_features = first.shape
        grouped = format in FOUR_BITS or (format != "dense" and group_size != 0)
        self.group_size = _group_size(group_size, self.in_features) if grouped else 0
        bias = held.get("bias")
        self.bias = None if bias is None else bias.to(self.device, dtype).contiguous()
        self.weights = self._pack(held)
        w = self.weights
        self.nbytes = tensor_bytes(w.weight, w.order, self.bias)
        if format != "dense":
            self.nbytes += tensor_bytes(w.scale)
        if format == "code4" or (format in WITH_ZEROS and w.scale.dtype != torch.int32):
            self.nbytes += tensor_bytes(w.zero)
        self._workspace = workspace or Workspace(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if not len(x):
            return x.new_empty(0, self.out_features)
        config = choose(self.weights, len(x))
        parts = (self.out_features,)
        nothing = self._workspace.take("nothing", 1)
        want = wanted(len(x), self.weights, None, config, 1)
        inputs = run_inputs(x, want, None, None, self._workspace)
        return run_gemm(
            inputs, nothing, nothing, self.weights, parts, None, config, None, self._workspace,
            Output(),
        )  # fmt: skip

    def weight(self) -> Tensor:
        return self.weight_rows(0, self.out_features)

    def weight_rows(self, start: int, end: int) -> Tensor:
        held = self._held(slice(start, end))
        weight = self._dequantized(held)
        return weight[:, held["order"].argsort()] if "order" in held else weight

    def _dequantized(self, held: dict[str, Tensor]) -> Tensor:
        """float32 [out, in], in the order that it is held in."""
        if self.format == "dense":
            return held["weight"].float()
        numbers = held["q"].float()
        if self.format == "fp8":
            numbers = held["q"].view(torch.float8_e4m3fn).float()
        elif self.format == "code4":
            numbers = held["code"][held["q"].int()]
        if not self.group_size:
            return numbers * held["scale"][:, None]
        index = torch.arange(self.in_features) // self.group_size
        if "zero" in held:
            numbers -= held["zero"][:, index]
        return numbers * held["scale"][:, index]

    def held(self) -> dict[str, Tensor]:
        return self._held(slice(0, self.out_features))

    def _held(self, rows: slice) -> dict[str, Tensor]:
        """Of some outputs. Words come to the host as they lie, of all rows: to pick some on the
        device would take its memory."""
        w = self.weights
        found: dict[str, Tensor] = {}
        if self.format == "dense":
            found["weight"] = to_host(w.weight[rows])
        else:
            found["q"] = unpack_weight(to_host(w.weight)[:, rows], self.format, self.in_features)
            scale, zero = to_host(w.scale)[..., rows], to_host(w.zero)
            if scale.dtype == torch.int32:
                both = scale.unsqueeze(-1).view(_half(self.dtype))
                scale, zero = both[..., 0].float(), both[..., 1].float()
            elif self.format in WITH_ZEROS:
                zero = zero[..., rows]
            found["scale"] = self._by_row(scale)
            if self.format in WITH_ZEROS:
                found["zero"] = self._by_row(zero)
            if self.format == "code4":
                found["code"] = zero
        if self.bias is not None:
            found["bias"] = to_host(self.bias[rows])
        if w.order is not None:
            found["order"] = to_host(w.order).long()
        return found

    def _pack(self, held: dict[str, Tensor]) -> Weights:
        none = torch.zeros(16, device=self.device)
        order = held.get("order")
        if order is not None:
            order = order.to(self.device, torch.int32)
        weight, scale, zero, whole = none, none, none, True
        if self.format == "dense":
            weight = held["weight"].to(self.device, self.dtype).contiguous()
        else:
            weight = pack_weight(held["q"], self.format)
            scale = self._by_group(held["scale"])
        if self.format in WITH_ZEROS:
            whole = bool(torch.equal(held["zero"], held["zero"].round()))
            scale, zero = _pair(scale, self._by_group(held["zero"]), self.dtype, none)
        elif self.format == "code4":
            zero = held["code"].float().contiguous()
        return Weights(
            self.format, self.in_features, self.out_features, self.group_size, self.dtype,
            weight.to(self.device), scale.to(self.device), zero.to(self.device), self.bias, whole,
            order,
        )  # fmt: skip

    def _by_group(self, values: Tensor) -> Tensor:
        """float32 [groups, out] of values [out, groups], as many groups as whole steps have; values
        [out] of rows as they are."""
        if not self.group_size:
            return values.float().contiguous()
        wanted = -(-self.in_features // DEEPEST) * max(1, DEEPEST // self.group_size)
        if self.group_size > DEEPEST:
            wanted = values.shape[1]
        return F.pad(values.float(), (0, wanted - values.shape[1])).T.contiguous()

    def _by_row(self, values: Tensor) -> Tensor:
        """What `_by_group` was given."""
        if not self.group_size:
            return values
        return values[: -(-self.in_features // self.group_size)].T.contiguous()


def make_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    quantize: str = "none",
    group_size: int = INT4_GROUP,
    device: torch.device | None = None,
    activations: str = "float",
) -> GpuLinear:
    """From a float weight [out, in]. quantize: "none", "int8" and "fp8" (e4m3), both with a scale
    per output row, or "int4" in groups of `group_size` inputs: 8, 16, 32, 64, a multiple of 128,
    or at least in_features for one group of all. activations: "float", or with "int8" and "int4"
    "int8": each token's inputs are quantized."""
    if quantize not in FORMATS:
        raise ValueError(f'quantize is "{quantize}"; it must be one of {", ".join(FORMATS)}')
    if quantize == "none":
        held = {"weight": weight.detach()}
    elif quantize == "fp8":
        held = quantize_fp8(weight)
    elif quantize == "int8":
        held = quantize_weight(weight, 8)
    else:
        held = quantize_weight(weight, 4, _group_size(group_size, weight.shape[1]))
    if bias is not None:
        held["bias"] = bias
    format = "dense" if quantize == "none" else quantize
    if activations != "float":
        if activations != "int8" or quantize not in IN_8_BITS:
            raise ValueError(
                f'activations "{activations}" with quantize "{quantize}": there are "float", and '
                f'"int8" with one of {", ".join(IN_8_BITS)}'
            )
        format = IN_8_BITS[quantize]
    return GpuLinear(held, format, dtype, group_size if quantize == "int4" else 0, device)


def quantize_fp8(weight: Tensor) -> dict[str, Tensor]:
    """q: uint8 [out, in], the bits of float8 e4m3; scale: float32 [out], the largest weight of a
    row is 448, the largest number of the format."""
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise ValueError("weight has values that are not finite; they cannot be quantized")
    scale = w.abs().amax(1) / 448
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return {"q": (w / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), "scale": scale}


def concat(linears: Sequence[GpuLinear]) -> GpuLinear:
    """One linear whose outputs are those of `linears`, one after the other; of one format, dtype,
    group size, in_features and order of these. A missing bias is zeros if another has one."""
    first = linears[0]
    for other in linears[1:]:
        if not _alike(other, first):
            raise ValueError(f"cannot join {_name(first)} and {_name(other)}")
    if len(linears) == 1:
        return first
    held = [linear.held() for linear in linears]
    if any("bias" in h for h in held):
        for h, linear in zip(held, linears, strict=True):
            h.setdefault("bias", torch.zeros(linear.out_features, dtype=linear.dtype))
    joined = {name: torch.cat([h[name] for h in held]) for name in held[0] if name not in SHARED}
    joined |= {name: held[0][name] for name in SHARED if name in held[0]}
    return GpuLinear(joined, first.format, first.dtype, first.group_size, first.device)


def _group_size(group_size: int, in_features: int) -> int:
    if group_size >= in_features or group_size == -1:
        return -(-in_features // DEEPEST) * DEEPEST
    if group_size not in (8, 16, 32, 64) and (group_size <= 0 or group_size % DEEPEST):
        raise ValueError(
            f"group_size is {group_size}; the GPU takes 8, 16, 32, 64, multiples of {DEEPEST} and "
            "-1 for one group of all inputs"
        )
    return group_size


def _half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type that scales and zeros are held in; float32 is served by float16's words."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def _pair(scale: Tensor, zero: Tensor, dtype: torch.dtype, none: Tensor) -> tuple[Tensor, Tensor]:
    """[groups, out] each -> what `Weights` holds."""
    both = torch.stack((scale, zero), -1)
    narrow = both.to(_half(dtype))
    if torch.equal(narrow.double(), both.double()):
        return narrow.contiguous().view(torch.int32).squeeze(-1), none
    return scale, zero


def _alike(a: GpuLinear, b: GpuLinear) -> bool:
    kinds = [(x.format, x.dtype, x.group_size, x.in_features) for x in (a, b)]
    first, second = a.held(), b.held()
    return kinds[0] == kinds[1] and all(
        torch.equal(first[name], second[name])
        if name in first and name in second
        else name not in first and name not in second
        for name in SHARED
    )


def _name(linear: GpuLinear) -> str:
    return (
        f"{linear.format} in {linear.dtype}, in_features {linear.in_features}, "
        f"group_size {linear.group_size}"
    )
