"""Config: what `deltaserve serve` can be told, checked. A refusal names the flag."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
"""What an adapter may be called: no ``@`` (digests), ``+`` and ``,`` (lists in metrics)."""

NAME_RULE = (
    "a name starts with a letter or digit and has at most 128 letters, digits and . _ / : - signs"
)

DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("none", "int8", "int4")
ACTIVATIONS = ("float", "int8")
DEVICES = ("cpu", "cuda")
DEVICE_DTYPES = {"cuda": "bfloat16"}
"""What is computed in on a device unless the operator says; float32 elsewhere."""
LOG_LEVELS = ("debug", "info", "warning", "error")

HTTP_PORT = 8000
"""Where OpenAI's API is if --http-port does not say."""

NO_STATE = "none"
"""What --state is called that keeps nothing."""

MAX_PATCHES = 8
MAX_DRAFT = 32
"""Tokens that may be drafted for a request in one step."""


class ConfigError(ValueError):
    """A flag that is wrong; the message starts with its name."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """How the base is held and computed.

    base: checkpoint folder. dtype: of weights that are not quantized, and of activations.
    quantize: of the linear weights; group_size: input features that share a scale (int4).
    activations: ``int8`` multiplies in integers, quantizing each token's activations, which is
    faster and slightly less exact; ``float`` does not. device: ``cpu`` or ``cuda``. threads: of
    torch; None leaves it to torch.
    allow_untested: also architectures that the test suite does not cover. served_names: what
    requests call it; none for its folder.
    """

    base: Path
    dtype: str = "float32"
    quantize: str = "none"
    group_size: int = 64
    activations: str = "float"
    device: str = "cpu"
    threads: int | None = None
    allow_untested: bool = False
    served_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.served_names:
            if not ADAPTER_NAME.fullmatch(name):
                raise ConfigError(f"--served-model-name {name}: {NAME_RULE}")
            if self.served_names.count(name) > 1:
                raise ConfigError(f"--served-model-name {name}: is given twice")
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--quantize", self.quantize, QUANTIZATIONS)
        _one_of("--activations", self.activations, ACTIVATIONS)
        _one_of("--device", self.device, DEVICES)
        if self.activations == "int8" and self.quantize == "none":
            raise ConfigError(
                "--activations int8: needs integer weights; add --quantize int8 or int4"
            )
        _at_least("--group-size", self.group_size, 8)
        if self.group_size % 8:
            raise ConfigError(f"--group-size {self.group_size}: must be a multiple of 8")
        if self.threads is not None:
            _at_least("--threads", self.threads, 1)
        if not self.base.is_dir():
            raise ConfigError(f"--base {self.base}: no such folder; give a checkpoint folder")


@dataclass(frozen=True, slots=True)
class Patch:
    """An adapter that is part of every request, with this factor on its change."""

    name: str
    path: Path
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Which adapters may be served.

    preload: (name, path) loaded before the server is ready. registered: (name, path) checked before
    the server is ready and loaded when they are asked for. roots: folders that adapters loaded over
    the wire must lie in; none forbids loading over the wire. bytes: memory that all adapters may
    take, None for a share of what is free. allow_base_mismatch: accept adapters that were made for
    another base of the same shapes. patches: part of every request, in this order. parents:
    (adapter of preload, the one that its files are relative to). tasks: (adapter of preload, which
    of its tasks). max_errors: (adapter of preload, the relative error that smaller forms of its
    weights may have). host_bytes: of the host's memory, for adapters that had to leave a device
    with memory of its own.
    """

    preload: tuple[tuple[str, Path], ...] = ()
    roots: tuple[Path, ...] = ()
    bytes: int | None = None
    allow_base_mismatch: bool = False
    patches: tuple[Patch, ...] = ()
    parents: tuple[tuple[str, str], ...] = ()
    tasks: tuple[tuple[str, int], ...] = ()
    max_errors: tuple[tuple[str, float], ...] = ()
    registered: tuple[tuple[str, Path], ...] = ()
    cache_bytes: int = 0
    cache_folder: Path | None = None
    host_bytes: int = 0
    loaders: int = 2
    loader_processes: bool = False
    loader_cores: tuple[int, ...] = ()
    loader_nice: int = 10

    def __post_init__(self) -> None:
        given = [("--adapter", name, path) for name, path in self.preload]
        given += [("--patch", patch.name, patch.path) for patch in self.patches]
        names = [name for _, name, _ in given]
        for flag, name, path in given:
            if not ADAPTER_NAME.fullmatch(name):
                raise ConfigError(f"{flag} {name}={path}: {NAME_RULE}")
            if names.count(name) > 1:
                raise ConfigError(f"{flag} {name}={path}: the name {name!r} is given twice")
            if not path.exists():
                raise ConfigError(f"{flag} {name}={path}: no such file or folder")
        if len(self.patches) > MAX_PATCHES:
            raise ConfigError(f"--patch: {len(self.patches)} of them; at most {MAX_PATCHES}")
        self.in_order()
        for flag, values in (("--task", self.tasks), ("--max-error", self.max_errors)):
            chosen = [name for name, _ in values]
            for name, value in values:
                if name not in dict(self.preload):
                    raise ConfigError(f"{flag} {name}={value:g}: no --adapter of that name")
                if chosen.count(name) > 1:
                    raise ConfigError(f"{flag} {name}={value:g}: {name!r} is given twice")
        taken = set(names)
        for name, path in self.registered:
            if name in taken:
                raise ConfigError(f"--adapter-dir {path}: the name {name!r} is given twice")
            taken.add(name)
        for root in self.roots:
            if not root.is_dir():
                raise ConfigError(f"--adapter-root {root}: no such folder")
        if self.bytes is not None:
            _at_least("--adapter-bytes", self.bytes, 1)
        _at_least("--adapter-cache", self.cache_bytes, 0)
        _at_least("--host-adapter-bytes", self.host_bytes, 0)
        folder = self.cache_folder
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ConfigError(f"--adapter-cache-dir {folder}: is not a folder")
        _at_least("--loaders", self.loaders, 1)
        if self.loader_processes and sys.platform != "linux":
            raise ConfigError("--loader-processes: needs Linux; use --no-loader-processes")
        if not 0 <= self.loader_nice <= 19:
            raise ConfigError(f"--loader-nice {self.loader_nice}: must be from 0 to 19")
        if self.loader_cores and not self.loader_processes:
            raise ConfigError("--loader-cores: needs --loader-processes")
        for core in self.loader_cores:
            if core not in os.sched_getaffinity(0):
                raise ConfigError(f"--loader-cores {core}: this process may not run on that core")

    def in_order(self) -> list[tuple[str, Path, str]]:
        """(name, path, parent) of preload, every parent before its children."""
        known = dict(self.preload)
        for child, parent in self.parents:
            where = f"--parent {child}={parent}"
            if child not in known or parent not in known:
                raise ConfigError(f"{where}: both must be names of --adapter")
            if [c for c, _ in self.parents].count(child) > 1:
                raise ConfigError(f"{where}: {child!r} is given two parents")
        parents = dict(self.parents)
        ordered: list[tuple[str, Path, str]] = []
        while len(ordered) < len(known):
            placed = {name for name, _, _ in ordered} | {""}
            free = [n for n in known if n not in placed and parents.get(n, "") in placed]
            if not free:
                left = ", ".join(sorted(known.keys() - placed))
                raise ConfigError(f"--parent: {left} are each other's parents")
            ordered += [(name, known[name], parents.get(name, "")) for name in free]
        return ordered


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How requests share the model.

    memory: bytes of cache blocks and adapters together; None for a share of what is free.
    max_batch_tokens: tokens of one step, prompts in chunks. max_sequences: requests in one step.
    kv_cache_bytes: most of it that blocks may take; None for no such limit. block_size: tokens in a
    block.
    max_length: tokens of a request, prompt and answer; None for the model's own limit.
    max_queue: requests that may wait or run before some are turned away. max_queue_per_flow: that
    may wait, of one user for one adapter; None for no limit of its own. max_wait: seconds to the
    first token, of requests that do not say; None for no limit. inter_token_target: most seconds
    that a step should take while somebody decodes; None for steps of any length. speculate: most
    tokens drafted in a step for a request that does not say; 0 is off. enforce_eager: launch every
    step kernel by kernel, instead of decoding from graphs, on a device that has such.
    """

    max_batch_tokens: int = 512
    max_sequences: int = 256
    kv_cache_bytes: int | None = None
    block_size: int = 16
    prefix_cache: bool = True
    max_length: int | None = None
    max_queue: int = 4096
    max_queue_per_flow: int | None = None
    max_wait: float | None = None
    inter_token_target: float | None = None
    speculate: int = 0
    memory: int | None = None
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        _at_least("--max-batch-tokens", self.max_batch_tokens, 1)
        _at_least("--max-sequences", self.max_sequences, 1)
        _at_least("--block-size", self.block_size, 1)
        _at_least("--max-queue", self.max_queue, 1)
        if self.max_queue_per_flow is not None:
            _at_least("--max-queue-per-flow", self.max_queue_per_flow, 1)
        _positive("--max-wait", self.max_wait)
        _positive("--inter-token-target", self.inter_token_target)
        if not 0 <= self.speculate <= MAX_DRAFT:
            raise ConfigError(f"--speculate {self.speculate}: must be from 0 to {MAX_DRAFT}")
        if self.memory is not None:
            _at_least("--memory", self.memory, 1)
        if self.kv_cache_bytes is not None:
            _at_least("--kv-cache-bytes", self.kv_cache_bytes, 1)
        if self.max_length is not None:
            _at_least("--max-length", self.max_length, 2)

    @property
    def most_decodes(self) -> int:
        """Tokens of a step without prompts: one of each sequence, and its drafts, which take only
        what prompts leave."""
        most = self.max_sequences * (1 + self.speculate)
        return max(self.max_sequences, min(most, self.max_batch_tokens))


@dataclass(frozen=True, slots=True)
class RpcConfig:
    """How the server is reached.

    port 0 picks a free one; http_port and metrics_port None are off. http_required: whether the
    server must not start where http_port is taken; else there is no HTTP then. max_seconds: longest
    life of a request. write_seconds: how long a client may not read before its stream is ended.
    grace_seconds: how long running requests may go on after SIGTERM. max_message_bytes: of a
    request.
    tls_certificate, tls_key: PEM files, both or none. tls_client_ca: PEM file of the authorities
    that clients must have a certificate of. console: /console is served over HTTP.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int | None = None
    http_required: bool = True
    metrics_port: int | None = None
    max_seconds: float = 3600.0
    write_seconds: float = 30.0
    grace_seconds: float = 30.0
    max_message_bytes: int = 16 << 20
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    console: bool = True

    def __post_init__(self) -> None:
        _port("--port", self.port)
        for flag, port in (
            ("--http-port", self.http_port),
            ("--metrics-port", self.metrics_port),
        ):
            if port is not None:
                _port(flag, port)
        for flag, value in (
            ("--max-seconds", self.max_seconds),
            ("--write-seconds", self.write_seconds),
        ):
            if not value > 0:
                raise ConfigError(f"{flag} {value:g}: must be above 0")
        if not self.grace_seconds >= 0:
            raise ConfigError(f"--grace-seconds {self.grace_seconds:g}: must be 0 or more")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("--tls-certificate and --tls-key: give both or none")
        _readable("--tls-certificate", self.tls_certificate)
        _readable("--tls-key", self.tls_key)
        _readable("--tls-client-ca", self.tls_client_ca)
        if self.tls_client_ca is not None and self.tls_key is None:
            raise ConfigError("--tls-client-ca: needs --tls-certificate and --tls-key")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything. state: where adapters that are registered over the API are kept, as `state.url`
    reads it. keys: file of keys and tenants, `identity.key_file`."""

    model: ModelConfig
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rpc: RpcConfig = field(default_factory=RpcConfig)
    log_level: str = "info"
    state: str = NO_STATE
    keys: Path | None = None

    def __post_init__(self) -> None:
        _one_of("--log-level", self.log_level, LOG_LEVELS)
        _readable("--keys", self.keys)
        self._check_names()
        if not self.state:
            raise ConfigError(f"--state: is empty; give a path, a URL, or {NO_STATE}")

    def _check_names(self) -> None:
        """The base's are no adapter's."""
        given = self.adapters
        flags = {name: f"--adapter-dir {path}" for name, path in given.registered}
        flags |= {patch.name: f"--patch {patch.name}={patch.path}" for patch in given.patches}
        flags |= {name: f"--adapter {name}={path}" for name, path in given.preload}
        for name in self.model.served_names or (str(self.model.base),):
            if name in flags:
                raise ConfigError(
                    f"{flags[name]}: the base is called {name!r} as well; rename one of them (the "
                    "base by --served-model-name)"
                )


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{flag} {value}: must be one of {', '.join(known)}")


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{flag} {value}: must be at least {least}")


def _positive(flag: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"{flag} {seconds}: must be a number of seconds above 0")


def _readable(flag: str, file: Path | None) -> None:
    if file is not None and not (file.is_file() and os.access(file, os.R_OK)):
        raise ConfigError(f"{flag} {file}: no such file, or it may not be read")


def _port(flag: str, value: int) -> None:
    if not 0 <= value <= 65535:
        raise ConfigError(f"{flag} {value}: must be from 0 (any free port) to 65535")
