"""load(): a Hugging Face causal language model from a folder, in the form it is served in."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from deltaserve.adapters.base import ModuleSpec
from deltaserve.kernels.backend import Backend
from deltaserve.kernels.base.quantize import INT4_GROUP, check_group_size
from deltaserve.kernels.cpu_backend import CpuBackend
from deltaserve.server.model import architectures, rope
from deltaserve.server.model.assembly import assemble
from deltaserve.server.model.attention import ATTENTION
from deltaserve.server.model.base_model import BaseModel
from deltaserve.server.model.context import ForwardContext
from deltaserve.server.model.errors import (
    MalformedModel,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
)
from deltaserve.server.model.fused import fuse
from deltaserve.server.model.memory import trim
from deltaserve.server.model.probe import PROBE, ArchReport, probe
from deltaserve.server.model.quantized import Format, Packed, format_of
from deltaserve.server.model.quantized.state import state_dict
from deltaserve.server.model.quantizer import PlanConfig, QuantizationPlan, Scheme
from deltaserve.server.model.spec import base_spec, original_modules

Quantize: TypeAlias = Literal["none", "int8", "int4"]
Progress: TypeAlias = Callable[[float, str], None]
_AUTO: Any = AutoModelForCausalLM
_LOGGING: Any = transformers_logging
logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16)

# Shares of the time that the stages take, for the progress: probe, read, assemble, fingerprint.
READ, ASSEMBLE, DIGEST = 0.02, 0.6, 0.8


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Linears that are computed as one. bits: of their weights, None if they are dense."""

    in_features: int
    parts: tuple[int, ...]
    bits: int | None


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What is known of the model before any weight is read. config: without what it says of
    quantization. stored: how the checkpoint's weights are quantized, None if they are not. prefix:
    what transformers calls the part without the head."""

    config: PreTrainedConfig
    stored: Format | None
    report: ArchReport
    modules: Mapping[str, ModuleSpec]
    model_class: type[PreTrainedModel]
    prefix: str
    tied: Mapping[str, str]
    max_length: int


def load(
    path: str | Path,
    *,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    group_size: int | None = None,
    activations: Literal["float", "int8"] = "float",
    quantize_head: bool = True,
    max_length: int | None = None,
    progress: Progress | None = None,
    allow_untested: bool = False,
    backend: Backend | None = None,
) -> BaseModel:
    """Reads, quantizes and fuses a checkpoint folder (config.json and safetensors).

    dtype: float32 or bfloat16, of activations and of all weights that are not quantized. quantize:
    of all linears but routers, and of no fused experts. group_size: inputs that share a scale in
    int4. quantize_head: lm_head in int8 whenever the rest is quantized. max_length: at most the
    model's own limit, which is the default. progress: is called with the share done (0 to 1) and
    what is being done. allow_untested: also architectures that the test matrix does not cover.
    backend: what is to compute; the CPU if it is not given.

    Raises ModelNotFound, MalformedModel or UnsupportedModel; ValueError for options.
    """
    say = progress or (lambda share, what: None)
    _check_options(dtype, quantize, activations, group_size)
    folder = checkpoint_folder(Path(path))
    say(0.0, "probing the architecture")
    skeleton = skeleton_of(folder, dtype, max_length, allow_untested)
    if skeleton.stored is not None:
        check_stored(folder, skeleton.stored, quantize)
        for note in skeleton.stored.notes:
            logger.warning("%s: %s", folder, note)
    schemes = schemes_for(skeleton, dtype, quantize, group_size, activations, quantize_head)
    model, plan = _read(folder, skeleton, schemes, dtype, say)
    rope.pin(model, skeleton.config, skeleton.max_length)
    ctx = ForwardContext(backend or CpuBackend())
    modules = assemble(
        model,
        skeleton.report,
        schemes,
        plan.linears,
        ctx,
        dtype,
        lambda share: say(ASSEMBLE + (DIGEST - ASSEMBLE) * share, "packing the weights"),
    )
    fuse(model, skeleton.report, modules, ctx, dtype)
    say(DIGEST, "fingerprinting the checkpoint")
    text = skeleton.config.get_text_config()
    sizes = (int(text.hidden_size), modules.group_of[skeleton.report.head].base.out_features)
    spec = base_spec(
        folder,
        skeleton.config.to_dict(),
        sizes,
        skeleton.report,
        skeleton.modules,
        modules,
        skeleton.tied,
        quantize if skeleton.stored is None else skeleton.stored.label,
    )
    defaults = _generation(folder, skeleton.config)
    trim()
    say(1.0, "loaded")
    return BaseModel(
        spec=spec,
        attention=skeleton.report.attention,
        max_length=skeleton.max_length,
        vocab_size=sizes[1],
        eos_token_ids=_ids(defaults.get("eos_token_id")),
        generation=defaults,
        folder=folder,
        dtype=dtype,
        ctx=ctx,
        nbytes=_nbytes(model) + sum(g.base.nbytes for g in modules.groups.values()),
        model=model,
        modules=modules,
    )


def linear_shapes(
    path: str | Path,
    *,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    group_size: int | None = None,
    allow_untested: bool = False,
) -> list[LinearShape]:
    """The model's distinct groups of linears, as `load` would hold them; no weight is read.

    Raises what `load` raises.
    """
    _check_options(dtype, quantize, "float", group_size)
    folder = checkpoint_folder(Path(path))
    skeleton = skeleton_of(folder, dtype, None, allow_untested)
    if skeleton.stored is not None:
        raise UnsupportedModel(
            f"{folder} is quantized already ({skeleton.stored.label}); its groups are known once "
            "its weights are read"
        )
    schemes = schemes_for(skeleton, dtype, quantize, group_size, "float", True)
    found: dict[LinearShape, None] = {}
    for names in skeleton.report.groups:
        modules = [skeleton.modules[name] for name in names]
        scheme = schemes.get(names[0])
        bits = None if scheme is None else scheme.bits
        parts = tuple(m.out_features for m in modules)
        found[LinearShape(modules[0].in_features, parts, bits)] = None
    return list(found)


def _check_options(
    dtype: torch.dtype, quantize: str, activations: str, group_size: int | None
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32 or bfloat16")
    if quantize not in ("none", "int8", "int4"):
        raise ValueError(f'quantize is "{quantize}"; it must be "none", "int8" or "int4"')
    if activations not in ("float", "int8"):
        raise ValueError(f'activations is "{activations}"; it must be "float" or "int8"')
    if activations == "int8" and quantize == "none":
        raise ValueError('activations "int8" needs quantize "int8" or "int4", not "none"')
    if group_size is not None:
        check_group_size(group_size)


def check_stored(folder: Path, stored: Format, quantize: str) -> None:
    """Raises UnsupportedModel for a checkpoint that is to be quantized once more."""
    if quantize != "none":
        raise UnsupportedModel(
            f"--quantize {quantize}: {folder} is quantized already ({stored.label}) and is served "
            "as it is; leave the option out, or load the original weights"
        )


def checkpoint_folder(folder: Path) -> Path:
    """``folder``, if it holds a config and safetensors; else ModelNotFound or UnsupportedModel."""
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder}: no folder with a config.json")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        if pickled:
            raise UnsupportedModel(
                f"{folder}: {pickled[0]} is a pickle, which can run code when it is read; "
                "convert the checkpoint to safetensors"
            )
        raise ModelNotFound(f"{folder}: no *.safetensors")
    return folder


def skeleton_of(
    folder: Path, dtype: torch.dtype, max_length: int | None, allow_untested: bool
) -> Skeleton:
    """The model of a checkpoint folder, built on the meta device and run dry."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"{folder}/config.json: {error}") from error
    architectures.check(config, allow_untested=allow_untested)
    stored = format_of(config.__dict__.pop("quantization_config", None))
    length = rope.max_length(config, max_length)
    try:
        with torch.device("meta"):
            model = _AUTO.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=PROBE
            ).eval()
    except Exception as error:  # each architecture fails in its own way
        what = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"{config.model_type}: cannot be built: {what}") from error
    model.config.pad_token_id = None  # with it some models look for padding in the ids' values
    rope.pin(model, config, length)
    if hasattr(model, "set_experts_implementation") and _has_experts(model):
        model.set_experts_implementation(PROBE)
    report = probe(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = {report.head: report.embedding} if head.weight is embedding.weight else {}
    found = original_modules(model, report)
    prefix = model.base_model_prefix
    return Skeleton(config, stored, report, found, type(model), prefix, tied, length)


def _has_experts(model: nn.Module) -> bool:
    return any("experts" in name for name, _ in model.named_modules())


def schemes_for(
    skeleton: Skeleton,
    dtype: torch.dtype,
    quantize: str,
    group_size: int | None,
    activations: str,
    quantize_head: bool,
) -> dict[str, Scheme]:
    """How the linears' weights are held; the dense ones are left out. Routers and the gates of
    shared experts are small and decide much: they stay dense."""
    if quantize == "none":
        return {}
    report = skeleton.report
    bits = 8 if quantize == "int8" else 4
    each = Scheme(bits, group_size or INT4_GROUP, activations, dtype)
    blocks = tuple(name.rpartition(".")[0] + "." for name in report.experts)
    names = [name for group in report.groups for name in group if name != report.head]
    narrow = {n for n in names if skeleton.modules[n].out_features in (1, *report.experts.values())}
    schemes = {n: each for n in names if not (n in narrow and n.startswith(blocks))}
    if quantize_head:
        schemes[report.head] = Scheme(8, INT4_GROUP, activations, dtype)
    return schemes


def _read(
    folder: Path,
    skeleton: Skeleton,
    schemes: Mapping[str, Scheme],
    dtype: torch.dtype,
    say: Progress,
) -> tuple[PreTrainedModel, QuantizationPlan]:
    early = {name: s for name, s in schemes.items() if name not in skeleton.tied}
    count = len(early)
    plan = QuantizationPlan(
        early,
        lambda n: say(READ + (ASSEMBLE - READ) * n / count, "reading and quantizing"),
        dtype=dtype,
    )
    say(READ, "reading the weights")
    options: dict[str, Any] = {
        "config": copy.deepcopy(skeleton.config),
        "dtype": dtype,
        "attn_implementation": ATTENTION,
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if early or skeleton.stored is not None:
        options["quantization_config"] = PlanConfig(plan)
    model_class: Any = skeleton.model_class
    try:
        with _quiet(), ExitStack() as stack:
            source: Path | None = folder
            if skeleton.stored is not None:
                source = None
                state = stack.enter_context(state_dict(folder, skeleton.stored))
                options["state_dict"] = state
                plan.packed = {k: v for k, v in state.items() if isinstance(v, Packed)}
                count = len(plan.packed)
            model, info = model_class.from_pretrained(source, **options)
            if skeleton.stored is not None:
                _check_biases(state, plan, info["unexpected_keys"])
    except ModelError:
        raise
    except Exception as error:
        raise plan.error or MalformedModel(f"{folder}: {error}") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            some = sorted(map(str, info[what]))
            raise MalformedModel(f"{folder}: {what.replace('_', ' ')}: {', '.join(some[:8])}")
    unread = sorted((set(early) | plan.paths) - set(plan.linears))
    if unread:
        raise MalformedModel(f"{folder}: no weights for {', '.join(unread[:8])}")
    model.eval().requires_grad_(False)
    model.config.pad_token_id = None  # with it some models look for padding on every call
    if skeleton.report.experts:
        model.set_experts_implementation("eager")
    return model, plan


def _check_biases(
    state: Mapping[str, Any], plan: QuantizationPlan, unexpected: Collection[str]
) -> None:
    """AutoGPTQ writes a bias of zeros for linears that have none. Another one would be lost."""
    for packed in plan.packed.values():
        name = f"{packed.module}.bias"
        if name in unexpected and bool(state[name][...].any()):
            raise MalformedModel(f"{name} is not zero, but the model's linear has no bias")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar; `load` reports its own progress."""
    shown = _LOGGING.is_progress_bar_enabled()
    _LOGGING.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            _LOGGING.enable_progress_bar()


def _generation(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """The checkpoint's sampling defaults; from config.json where it has no generation_config."""
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        found = GenerationConfig.from_model_config(config)
    values: dict[str, Any] = {k: v for k, v in found.to_dict().items() if v is not None}
    text = config.get_text_config()
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(text, key, None)
        if value is not None:
            values.setdefault(key, value)
    return values


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)


def _nbytes(model: nn.Module) -> int:
    """Of the parameters and buffers that stay in plain torch, shared ones once."""
    held = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())
