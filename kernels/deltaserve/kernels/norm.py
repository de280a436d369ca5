"""NormDeltas: what a step's adapters do to one norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.native import library
from deltaserve.kernels.native.pointers import PointerTable, entries
from deltaserve.kernels.primitives import Bias, Primitive, Replace
from deltaserve.kernels.rms_norm import rms_norm
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.kernels.table import HOST, unique_bytes


@dataclass(frozen=True, eq=False, slots=True)
class PreparedNorm:
    """gain, bias: float32 [hidden], or None where the adapter leaves the base's."""

    gain: Tensor | None
    bias: Tensor | None

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.gain, self.bias) if t is not None)

    @property
    def nbytes(self) -> int:
        return unique_bytes(self.tensors())

    def on(self, device: torch.device) -> PreparedNorm:
        """Itself, in that device's memory."""
        if device.type == "cpu":
            return self
        return PreparedNorm(*(t if t is None else t.to(device) for t in (self.gain, self.bias)))


def prepare(primitives: tuple[Primitive, ...], hidden: int) -> PreparedNorm:
    """What an adapter has on a norm, in host memory. hidden: size of the gain. Any thread.
    Raises ValueError for other primitives than one Replace and one Bias, or of the wrong size."""
    gain: Tensor | None = None
    bias: Tensor | None = None
    for p in primitives:
        match p:
            case Replace(weight) if gain is None:
                gain = _checked("Replace.weight", weight, hidden)
            case Bias(values) if bias is None:
                bias = _checked("Bias.bias", values, hidden)
            case _:
                raise ValueError(
                    f"{type(p).__name__} on a norm: it takes one Replace and one Bias at most"
                )
    return PreparedNorm(gain, bias)


def _checked(name: str, tensor: Tensor, hidden: int) -> Tensor:
    if tuple(tensor.shape) != (hidden,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the norm needs ({hidden},)")
    return cast(tensor, torch.float32)


# norm_item of native/norm.c
ITEM = (("gain", "u8"), ("bias", "u8"))


class NormDeltas:
    """hidden: size of the gain; dtype: of x and y; device: where they are. by_token: whether `rms`
    of one row for each token is for steps of the base and captured steps too."""

    by_token = False

    def __init__(self, hidden: int, dtype: torch.dtype, device: torch.device = HOST) -> None:
        self.hidden = hidden
        self.dtype = dtype
        self.device = device
        self.pointers = PointerTable(ITEM)
        self._prepared: dict[int, PreparedNorm] = {}

    def prepare(self, primitives: tuple[Primitive, ...]) -> PreparedNorm:
        """See `prepare`."""
        return prepare(primitives, self.hidden)

    def install(self, slot: int, prepared: PreparedNorm) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread."""
        self._prepared[slot] = own = prepared.on(self.device)
        vectors = (own.gain, own.bias)
        self.pointers.put(slot, [tuple(0 if v is None else v.data_ptr() for v in vectors)])

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        if self._prepared.pop(slot, None) is not None:
            self.pointers.put(slot, [])

    @property
    def nbytes(self) -> int:
        """Exact bytes installed, memory shared between slots counted once."""
        return unique_bytes([t for p in self._prepared.values() for t in p.tensors()])

    def touches(self, segments: Segments) -> bool:
        """Whether an adapter of the step changes this norm."""
        return not segments.slots.isdisjoint(self._prepared)

    def forward(
        self,
        x: Tensor,
        norm: Callable[[Tensor, Tensor | None], Tensor],
        gain: Tensor,
        segments: Segments,
    ) -> Tensor:
        """x: [T, hidden]. Returns ``norm(x, None)`` with the runs redone whose mix changes it.

        norm: the module's own function of some tokens [t, hidden] and a gain [hidden] in place of
        its own (None: its own). gain: the base's gain as `norm` would use it; `Replace` holds a
        gain of the same convention. A mix's gain is ``gain + sum of w (gain_a - gain)``.
        """
        y = norm(x, None)
        if not self.touches(segments):
            return y
        for mix, rows in self._by_mix(segments).items():
            new_gain, bias = self._mixed(mix, gain)
            index = torch.tensor(rows, device=y.device)
            changed = y[index] if new_gain is None else norm(x[index], new_gain)
            if bias is not None:
                changed = (changed.float() + bias).to(y.dtype)
            y[index] = changed
        return y

    def rms(
        self, x: Tensor, weight: Tensor, offset: float, eps: float, segments: Segments
    ) -> Tensor:
        """The same for RMS norms of gain ``weight + offset``, natively where that is possible. x:
        [T, ..., hidden], contiguous; weight: [hidden], of x's dtype; `Replace` holds a weight."""
        y = rms_norm(x, weight + offset, eps)
        lib = library() if x.device.type == "cpu" else None
        if segments.slots.isdisjoint(self._prepared):
            return y
        if lib is None:
            return self.forward(
                x,
                lambda x, g: rms_norm(x, (weight if g is None else g) + offset, eps),
                weight,
                segments,
            )
        assert x.is_contiguous() and x.dtype == weight.dtype
        failed = lib["ds_tuned_norm"](
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            x[0].numel() // self.hidden,
            self.hidden,
            weight.data_ptr(),
            offset,
            eps,
            y.data_ptr(),
            entries(segments),
            self.pointers.address,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the gain of ds_tuned_norm")
        return y

    def _by_mix(self, segments: Segments) -> dict[Mix, list[int]]:
        """Tokens of the mixes that change this norm: equal mixes share one call."""
        found: dict[Mix, list[int]] = {}
        for start, end, mix in segments.runs:
            if any(slot in self._prepared for slot, _ in mix):
                found.setdefault(mix, []).extend(range(start, end))
        return found

    def _mixed(self, mix: Mix, base: Tensor) -> tuple[Tensor | None, Tensor | None]:
        changes = [(self._installed(slot), w) for slot, w in mix if slot in self._prepared]
        gains = [(p.gain, w) for p, w in changes if p.gain is not None]
        biases = [p.bias * w for p, w in changes if p.bias is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        if not gains:
            return None, bias
        if len(gains) == 1 and gains[0][1] == 1:
            return gains[0][0].to(base.dtype), bias
        total = base.float().clone()
        for own, strength in gains:
            total.add_(own - base.float(), alpha=strength)
        return total.to(base.dtype), bias

    def _installed(self, slot: int) -> PreparedNorm:
        """On the device."""
        return self._prepared[slot]
