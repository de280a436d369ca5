"""How large everything is: for a GPU, and for a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_kernels.data import ON_GPU


@dataclass(frozen=True)
class Shape:
    """A Llama. group: inputs that share a scale. dtype: computed in. config: of transformers."""

    name: str
    config: dict[str, Any]
    group: int
    dtype: str

    def linears(self) -> dict[str, tuple[int, int]]:
        """Path within a layer -> (out, in)."""
        c = self.config
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        q, kv = (c[f"num_{k}_heads"] * c["head_dim"] for k in ("attention", "key_value"))
        return {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def modules(self) -> dict[str, tuple[int, int]]:
        """Path in the model -> (out, in), of every linear that is quantized."""
        return {
            f"model.layers.{i}.{name}": size
            for i in range(self.layers)
            for name, size in self.linears().items()
        }


@dataclass(frozen=True)
class Sizes:
    """batches: sequences that decode together, the most telling first; `many` is the one that
    adapters are measured at.
    prompt: tokens of each. warm: steps before a measurement of `steps` steps. resident: adapters in
    memory. bits: 1-bit ones. phases: quiet and loaded ones, each of `seconds`, with `streams`
    sequences. colds: first tokens of cold adapters. kv_bytes, adapter_bytes: of the server."""

    shape: Shape
    batches: tuple[int, ...]
    many: int
    prompt: int
    warm: int
    steps: int
    resident: int
    rank: int
    bits: int
    phases: int
    seconds: float
    streams: int
    colds: int
    kv_bytes: int
    adapter_bytes: int
    max_length: int
    max_batch_tokens: int
    max_sequences: int


LLAMA_8B = Shape(
    "Llama-3.1-8B, int4 in groups of 128, head in 16 bits",
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
    128,
    "bfloat16",
)
TINY = Shape(
    "rehearsal",
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 384,
        "rope_theta": 10000.0,
        "max_position_embeddings": 16384,
    },
    32,
    "bfloat16" if ON_GPU else "float32",
)
FULL = Sizes(
    LLAMA_8B, batches=(64, 1, 16, 256), many=64, prompt=448, warm=8, steps=112, resident=64,
    rank=16, bits=16, phases=3, seconds=6.0, streams=16, colds=5, kv_bytes=24 << 30,
    adapter_bytes=20 << 30, max_length=8192, max_batch_tokens=512, max_sequences=256,
)  # fmt: skip
REHEARSAL = Sizes(
    TINY, batches=(1, 2), many=2, prompt=4, warm=1, steps=2, resident=2, rank=4, bits=2,
    phases=1, seconds=1.2, streams=2, colds=1, kv_bytes=8 << 20, adapter_bytes=32 << 20,
    max_length=8192, max_batch_tokens=32, max_sequences=32,
)  # fmt: skip
