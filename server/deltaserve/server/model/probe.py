"""ArchProbe: a dry run on the meta device learns what the engine must know of an architecture.

Nothing is guessed from config names: the attention calls tell the layout of the KV cache, the
inputs of the linears tell which of them share one (and so become one GEMM), and shapes tell whose
rows are the step's tokens (only there can an adapter of one request be kept apart from another's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from deltaserve.kernels.attention.step import AttentionSpec
from deltaserve.server.model.errors import UnsupportedModel

PROBE = "deltaserve_probe"
"""The name under which the recording attention and experts functions are registered."""

HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments of the attention function that say nothing the engine does not know."""

LOGIT_ROWS = 3


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention as the modeling code calls it.

    window: a token sees itself and the window - 1 before it; None for all. softcap: of the logits.
    scale: of the dot products, before the softcap.
    """

    layer_idx: int
    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    softcap: float | None
    has_sinks: bool
    scale: float

    @property
    def spec(self) -> AttentionSpec:
        """What kernels are compiled for."""
        return AttentionSpec(
            self.q_heads, self.kv_heads, self.key_dim, self.value_dim, self.window, self.softcap,
            self.has_sinks,
        )  # fmt: skip


@dataclass(frozen=True)
class ArchReport:
    """attention: per layer, in order. attention_modules: paths of what calls the attention
    function. groups: linears that are fed the very same tensor by one parent, in order of calls;
    every linear that is called is in exactly one. by_token: linears whose input rows are the
    step's tokens (of `head`: the rows that logits are asked of). norms: path -> the dimension of
    its input that is the tokens', None if there is no one such. experts: paths of fused
    experts, and how many each has. head, embedding: lm_head's and the input embedding's path."""

    attention: tuple[LayerAttention, ...]
    attention_modules: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    by_token: frozenset[str]
    norms: Mapping[str, int | None]
    experts: Mapping[str, int]
    head: str
    embedding: str


@dataclass
class _Recorder:
    tokens: int
    attention: list[tuple[nn.Module, LayerAttention, frozenset[str]]] = field(default_factory=list)
    experts: list[nn.Module] = field(default_factory=list)
    # (module, its input, the input's version): the inputs stay alive, so identity means sameness
    linears: list[tuple[nn.Module, Tensor, int]] = field(default_factory=list)
    norms: list[tuple[nn.Module, Tensor]] = field(default_factory=list)


def _record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    recorder: _Recorder = module.deltaserve_probe  # type: ignore[assignment]
    if attention_mask is not None:
        raise UnsupportedModel("attention is called with a mask of the model's own")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModel("attention is not causal")
    layer = LayerAttention(
        layer_idx=int(module.layer_idx),  # type: ignore[arg-type]
        q_heads=query.shape[1],
        kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        window=sliding_window,
        softcap=softcap,
        has_sinks=s_aux is not None,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
    )
    recorder.attention.append((module, layer, frozenset(kwargs) - HARMLESS))
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _record_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    recorder: _Recorder = module.deltaserve_probe  # type: ignore[assignment]
    recorder.experts.append(module)
    return torch.empty_like(hidden_states)


AttentionInterface.register(PROBE, _record_attention)
ALL_EXPERTS_FUNCTIONS.register(PROBE, _record_experts)


def is_linear(module: nn.Module) -> bool:
    """By exact class: subclasses (some routers) return other things than a product."""
    return type(module) in (nn.Linear, Conv1D)


def is_norm(module: nn.Module) -> bool:
    """A leaf with a gain [hidden], and nothing but a bias beside it."""
    own = dict(module.named_parameters(recurse=False))
    gain = own.get("weight")
    return (
        "Norm" in type(module).__name__
        and gain is not None
        and gain.dim() == 1
        and set(own) <= {"weight", "bias"}
        and next(module.children(), None) is None
    )


def probe(model: PreTrainedModel) -> ArchReport:
    """Runs one forward pass of a throw-away model on the meta device, made with `PROBE` as its
    attention. Raises UnsupportedModel with what makes the architecture unsafe to drive."""
    names = {module: name for name, module in model.named_modules()}
    recorder = _Recorder(_distinct_length(model.config))
    _attach(model, recorder)
    ids = torch.zeros(1, recorder.tokens, dtype=torch.long, device="meta")
    rows = torch.zeros(LOGIT_ROWS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            out = model(
                input_ids=ids,
                position_ids=ids,
                attention_mask=None,
                use_cache=False,
                logits_to_keep=rows,
            )
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"a dry run of {type(model).__name__} failed: {type(error).__name__}: {error}"
        ) from error
    if tuple(out.logits.shape[:2]) != (1, LOGIT_ROWS):
        raise UnsupportedModel(f"{type(model).__name__} does not honour logits_to_keep")
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or type(head) is not nn.Linear:
        raise UnsupportedModel(f"{type(model).__name__} has no plain linear lm_head")
    _check_attention(model, recorder)
    return ArchReport(
        attention=tuple(sorted((a for _, a, _ in recorder.attention), key=lambda a: a.layer_idx)),
        attention_modules=tuple(names[m] for m, _, _ in recorder.attention),
        groups=tuple(_groups(recorder, names, head)),
        by_token=frozenset(_by_token(recorder, names, head)),
        norms=dict(_token_dimensions(recorder, names)),
        experts={names[m]: _experts(m) for m in recorder.experts},
        head=names[head],
        embedding=names[model.get_input_embeddings()],
    )


def _distinct_length(config: Any) -> int:
    """A prompt length that no other dimension of the model has, so that shapes are telling."""
    taken = {v for v in config.get_text_config().to_dict().values() if isinstance(v, int)}
    return next(n for n in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53) if n not in taken)


def _attach(model: PreTrainedModel, recorder: _Recorder) -> None:
    for module in model.modules():
        module.deltaserve_probe = recorder  # type: ignore[assignment]
        if is_linear(module):
            module.register_forward_pre_hook(
                lambda m, args: recorder.linears.append((m, args[0], args[0]._version))
            )
        elif is_norm(module):
            module.register_forward_pre_hook(
                lambda m, args: recorder.norms.append((m, args[0])) if args else None
            )


def _check_attention(model: PreTrainedModel, recorder: _Recorder) -> None:
    calls = sorted(a.layer_idx for _, a, _ in recorder.attention)
    layers = model.config.get_text_config().num_hidden_layers
    if calls != list(range(layers)):
        raise UnsupportedModel(
            f"attention is called for layers {calls}, where once for each of {layers} is expected"
        )
    unknown = sorted({name for _, _, kwargs in recorder.attention for name in kwargs})
    if unknown:
        raise UnsupportedModel(f"attention is called with the unknown arguments {unknown}")


def _groups(
    recorder: _Recorder, names: dict[nn.Module, str], head: nn.Module
) -> Iterator[tuple[str, ...]]:
    found: dict[tuple[int, int, str], list[str]] = {}
    calls: dict[str, int] = {}
    for module, _, _ in recorder.linears:
        calls[names[module]] = calls.get(names[module], 0) + 1
    for module, x, version in recorder.linears:
        name = names[module]
        alone = module is head or calls[name] > 1 or type(module) is not nn.Linear
        parent = name if alone else name.rpartition(".")[0]
        key = (0, 0, name) if alone else (id(x), version, parent)
        members = found.setdefault(key, [])
        if name not in members:
            members.append(name)
    yield from (tuple(members) for members in found.values())


def _experts(module: nn.Module) -> int:
    return max(p.shape[0] for p in module.parameters() if p.dim() == 3)


def _by_token(recorder: _Recorder, names: dict[nn.Module, str], head: nn.Module) -> Iterator[str]:
    odd: set[str] = set()
    for module, x, _ in recorder.linears:
        rows = LOGIT_ROWS if module is head else recorder.tokens
        if x.dim() < 2 or x.shape[-2] != rows or x.numel() != rows * x.shape[-1]:
            odd.add(names[module])
    yield from {names[module] for module, _, _ in recorder.linears} - odd


def _token_dimensions(
    recorder: _Recorder, names: dict[nn.Module, str]
) -> Iterator[tuple[str, int | None]]:
    found: dict[str, set[int | None]] = {}
    for norm, x in recorder.norms:
        places = [d for d, size in enumerate(x.shape[:-1]) if size == recorder.tokens]
        found.setdefault(names[norm], set()).add(places[0] if len(places) == 1 else None)
    for name, dimensions in found.items():
        yield name, dimensions.pop() if len(dimensions) == 1 else None
