"""AWQ: q, scale and zero per group of inputs, as AutoAWQ writes them.

    gemm  qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales float [groups, out]
    gemv  qweight int32 [out, in / 8], qzeros int32 [out, n >= groups / 8], scales float [out, 8 n]

4 bits a value, lowest first; in gemm the columns in a word are 0, 2, 4, 6, 1, 3, 5, 7. Layout:
`WQLinear_GEMM.from_linear` and `WQLinear_GEMV.from_linear` of AutoAWQ. w = (q - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve.kernels.base import BaseLinear
from deltaserve.server.model.errors import MalformedModel
from deltaserve.server.model.quantized import bits as streams
from deltaserve.server.model.quantized.build import whole
from deltaserve.server.model.quantized.fields import Fields
from deltaserve.server.model.quantized.format import Format
from deltaserve.server.model.quantized.gptq import HARMLESS as GPTQ_HARMLESS
from deltaserve.server.model.quantized.packed import FLOATS, Packed

BITS, WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMM, GEMV = "gemm", "gemv"

HARMLESS = GPTQ_HARMLESS - {"backend"} | {
    "do_fuse",
    "fuse_max_seq_len",
    "meta",
    "modules_to_fuse",
    "modules_to_not_convert",
}
"""`modules_to_not_convert`: which modules are packed is told by their tensors."""


class Awq(Format):
    marks: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        fields = Fields(config, "quantization_config")
        fields.one_of("bits", (BITS,), fields.get("w_bit"))
        self.group_size = fields.group_size(default=fields.get("q_group_size", 128))
        fields.one_of("zero_point", (True,), True, "without zeros AutoAWQ writes other layouts")
        backend = fields.get("backend", "autoawq")
        if backend == "llm-awq":
            raise fields.refusal("backend", "packs in another order; known: autoawq")
        version = fields.get("version", fields.get("format", fields.get("checkpoint_format", GEMM)))
        self.version = str(version).lower()
        for name in ("version", "format", "checkpoint_format"):
            given = fields.get(name, self.version)
            if str(given).lower() != self.version or self.version not in (GEMM, GEMV):
                raise fields.refusal(name, f"must be {GEMM!r} or {GEMV!r}")
        fields.one_of("desc_act", (False,), False)
        fields.one_of("method", ("awq",), "awq")
        fields.one_of("pack_dtype", ("int32",), "int32")
        fields.one_of("dynamic", ({},), {}, "rules per module are read of GPTQ only")
        fields.finish(HARMLESS)
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        self.label = f"awq-int4-{group}"

    def linear(self, packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        group = inner if self.group_size == -1 else self.group_size
        groups = -(-inner // group)
        if out % WORD or (self.version == GEMV and inner % WORD):
            raise MalformedModel(
                f"{packed.module} has {out} outputs and {inner} inputs; words hold {WORD}"
            )
        read = self._gemm if self.version == GEMM else self._gemv
        q, scale, zero = read(packed, out, inner, groups)
        return whole(q, BITS, scale, zero.float(), group, None, dtype)

    def _gemm(
        self, packed: Packed, out: int, inner: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        words = packed.take("qweight", (inner, out // WORD), (torch.int32,))
        zeros = packed.take("qzeros", (groups, out // WORD), (torch.int32,))
        scale = packed.take("scales", (groups, out), FLOATS)
        return _columns(words).T.contiguous(), scale.T, _columns(zeros).T

    def _gemv(
        self, packed: Packed, out: int, inner: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        words = packed.take("qweight", (out, inner // WORD), (torch.int32,))
        zeros = packed.take("qzeros", None, (torch.int32,))
        width = -(-groups // WORD)
        if zeros.dim() != 2 or zeros.shape[0] != out or zeros.shape[1] < width:
            raise MalformedModel(
                f"{packed.module}.qzeros has shape {tuple(zeros.shape)}; it must be {out} rows of "
                f"at least {width} words"
            )
        scale = packed.take("scales", (out, zeros.shape[1] * WORD), FLOATS)
        zero = streams.unpack(zeros, BITS, groups)
        return streams.unpack(words, BITS, inner), scale[:, :groups], zero


def _columns(words: Tensor) -> Tensor:
    """int32 [n, out / 8] -> uint8 [n, out]."""
    packed = streams.unpack(words, BITS, words.shape[1] * WORD)
    back = torch.tensor(ORDER).argsort()
    return packed.view(len(words), -1, WORD)[:, :, back].flatten(1)
