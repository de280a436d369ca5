"""Checkpoints whose weights are quantized already: read as they are, into our own linears."""

from __future__ import annotations

from typing import Any

from deltaserve.server.model.errors import UnsupportedModel
from deltaserve.server.model.quantized.awq import Awq
from deltaserve.server.model.quantized.bitsandbytes import BitsAndBytes
from deltaserve.server.model.quantized.compressed_tensors import CompressedTensors
from deltaserve.server.model.quantized.format import Format
from deltaserve.server.model.quantized.fp8 import Fp8
from deltaserve.server.model.quantized.gptq import Gptq
from deltaserve.server.model.quantized.packed import Packed

FORMATS: dict[str, type[Format]] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Fp8,
    "fp8": Fp8,
    "gptq": Gptq,
}
"""By `quant_method`."""

__all__ = ["FORMATS", "Format", "Packed", "format_of"]


def format_of(config: Any) -> Format | None:
    """The format that a `quantization_config` tells of; None for None.

    Raises UnsupportedModel for a method or a field that is not read.
    """
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise UnsupportedModel(
            f"config.json: quantization_config.quant_method is {method!r}; known: {known}. The "
            "original weights can be loaded and quantized with --quantize"
        )
    return FORMATS[method](config)
