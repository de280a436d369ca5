"""What calls answer with. Durations are seconds, sizes bytes, times `time.time()` seconds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. cached_tokens: prompt tokens that were not computed again. prefix_tokens:
    virtual tokens of a prompt- or prefix-tuned adapter. drafted_tokens: by speculative decoding, of
    which accepted_tokens became part of the completion. The prompts of a combination's members are
    counted one by one, its tokens once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prefix_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. queue includes adapter_load."""

    queue: float = 0.0
    adapter_load: float = 0.0
    time_to_first_token: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """One adapter that answered. modules: patterns of those it acted on, none for all. patch: it is
    part of every request to the server."""

    name: str
    digest: str
    strength: float
    modules: tuple[str, ...] = ()
    patch: bool = False


@dataclass(frozen=True, slots=True)
class ServedMember:
    """One member of a combination, with its weight at the start; no adapters means the base."""

    adapters: tuple[ServedAdapter, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class ServedBy:
    """What answered; no adapters means the base alone, or the members of a combination. route, arm:
    if the request named a route; assignment: how it came to the arm, ``sticky``, ``random``,
    ``outside`` or ``rolled_back``."""

    base: str = ""
    base_fingerprint: str = ""
    adapters: tuple[ServedAdapter, ...] = ()
    members: tuple[ServedMember, ...] = ()
    route: str = ""
    arm: str = ""
    assignment: str = ""


@dataclass(frozen=True, slots=True)
class TokenDisagreement:
    """How much the members of a combination disagreed on one token. divergence: the generalized
    Jensen-Shannon divergence in nats. logprobs: what each gave the token."""

    divergence: float
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WeightChange:
    """Other weights of a combination's members. token: index of the first token chosen by them."""

    token: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation. logprobs: one per token, None if they were not asked for; the first token
    of an echoed prompt has None. top_logprobs: per token the best ones as (token id,
    log-probability). finish_reason: ``stop``, ``length``, ``cancelled`` or ``dead_end``.
    disagreements: one per token, if the combination asked for them. weight_changes: by
    `set_weights`, in order."""

    text: str
    token_ids: list[int]
    logprobs: list[float | None] | None
    finish_reason: str
    stop_reason: str = ""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    disagreements: list[TokenDisagreement] = field(default_factory=list)
    weight_changes: list[WeightChange] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to a prompt. With n > 1 there are several choices; the other fields are those
    of the first, and the usage is that of all. prompt_logprobs: of the prompt's tokens, the first
    of which has None; prompt_top_logprobs: the best ones at each of their places. None if they were
    not asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[float | None] | None
    finish_reason: str
    usage: Usage
    served_by: ServedBy
    stop_reason: str = ""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    timings: Timings = Timings()
    request_id: str = ""
    choices: tuple[Choice, ...] = ()
    disagreements: list[TokenDisagreement] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in a stream, of the choice `index`. finish_reason, usage and timings come with
    its last piece, served_by and the prompt's log-probabilities with the stream's first."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] | None = None
    index: int = 0
    finish_reason: str | None = None
    stop_reason: str = ""
    usage: Usage | None = None
    timings: Timings | None = None
    served_by: ServedBy | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    request_id: str = ""
    disagreements: tuple[TokenDisagreement, ...] = ()
    weight_changes: tuple[WeightChange, ...] = ()
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """logprob: the sum over the tokens. greedy: each token is the most probable at its place."""

    logprob: float
    token_ids: list[int]
    logprobs: list[float]
    greedy: bool
    disagreements: list[TokenDisagreement] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A variant of the base that the server knows. state: ``registered``, ``loading``, ``ready``,
    ``unloading``, ``failed`` or ``unloaded``. tier: ``none``, ``disk``, ``host`` or ``device``.
    parent: the adapter that its files are relative to. patch: it is part of every request.
    tenant: whose it is, empty for the operator's; shared: every tenant may use it.
    own_tokenizer: it brings a tokenizer or chat template, which requests that name it use. Times
    are 0 for never."""

    name: str
    digest: str
    uri: str
    state: str
    tier: str
    format: str
    primitives: tuple[str, ...]
    resident_bytes: int
    source_bytes: int
    pinned: bool
    in_flight: int
    loads: int
    last_used: float
    loaded_at: float
    load_seconds: float
    error: str = ""
    notes: tuple[str, ...] = ()
    parent: str = ""
    patch: bool = False
    own_tokenizer: bool = False
    tenant: str = ""
    shared: bool = False


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """From a watch. snapshot: `adapters` is all there are; else these have changed."""

    snapshot: bool
    adapters: tuple[Adapter, ...]


@dataclass(frozen=True, slots=True)
class AdapterFit:
    """How many adapters of one kind, on every linear of the base, fit beside a request of the
    greatest length; kv_tokens: the cache's room beside half of them."""

    kind: str
    nbytes: int
    count: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server as it is now; requests are counted, sizes are bytes.

    memory_budget_bytes: keys, values and adapters together. kv_cache_bytes, adapter_budget_bytes:
    what each of them may take of it at most, kv_bytes and adapter_bytes what they take now.
    kv_floor_bytes: what adapters never take. free_bytes: beside the weights, at start. step_bytes:
    what a step computes with at most. adapter_fits: what fits, for common kinds. base_names: what
    requests may call the base; the first is how it is known.
    """

    version: str
    base: str
    base_names: tuple[str, ...]
    architecture: str
    fingerprint: str
    held_fingerprint: str
    quantization: str
    dtype: str
    max_length: int
    vocab_size: int
    chat: bool
    device: str
    adapter_formats: tuple[str, ...]
    weights_bytes: int
    kv_cache_bytes: int
    adapter_budget_bytes: int
    adapter_bytes: int
    running_requests: int
    waiting_requests: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_block_size: int
    memory_budget_bytes: int
    free_bytes: int
    step_bytes: int
    kv_token_bytes: int
    kv_floor_bytes: int
    kv_tokens: int
    adapter_fits: tuple[AdapterFit, ...]
    kv_bytes: int
    kv_blocks_idle: int
