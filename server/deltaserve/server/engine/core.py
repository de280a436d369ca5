"""The nouns that every part of the engine shares: requests in, outputs out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from deltaserve.server.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from deltaserve.server.engine.matcher import Matcher


class FinishReason(StrEnum):
    STOP = "stop"  # a stop string, a stop token, the end-of-sequence token or the constraint's end
    LENGTH = "length"  # max_tokens, or the model's length limit
    CANCELLED = "cancelled"
    ERROR = "error"
    DEAD_END = "dead_end"  # no token may follow


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Checked by `validate.check`.

    temperature 0 is greedy. top_k 0 and top_p 1 are off, as is min_p 0. logit_bias is added to
    the logits before anything else. bad_tokens: sequences of tokens that are never generated; all
    but the last token of one may be the prompt's. logprobs: None for none, k for the chosen token's
    and the k best; of the raw model distribution, before penalties, temperature and truncation.
    ranks: tell the ranks of the tokens that log-probabilities are
    returned of. length_penalty: (start, factor), factor 1 is off.
    seed: None draws one; a request with a seed gets the same tokens whatever else is in the batch.
    score_from: index of a prompt token; the log-probabilities of the prompt tokens from there on
    are returned with the first output, each with the prompt_logprobs best ones of its place.
    n > 1 is made of n requests by the caller.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    eos_ramp: float = 0.0
    length_penalty: tuple[int, float] = (0, 1.0)
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_tokens: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    score_from: int | None = None
    prompt_logprobs: int = 0
    ranks: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as the client named it: a name, or ``name@digest-prefix``. modules: patterns of
    the modules that it acts on; none for all of them. patch: the server's own, not the client's."""

    name: str
    strength: float = 1.0
    modules: tuple[str, ...] = ()
    patch: bool = False


class Rule(StrEnum):
    """How the members' distributions become one: `combine.combine`."""

    MEAN = "mean"
    PRODUCT = "product"


@dataclass(frozen=True, slots=True)
class Member:
    """One of a combination's distributions. prompt_ids: what it continues instead of the request's
    prompt. To score, both end in the tokens that are scored."""

    adapters: tuple[AdapterRef, ...] = ()
    weight: float = 1.0
    prompt_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Combination:
    """Members that continue the same text, each token chosen from all of their distributions. The
    first is the main one: penalties look at its prompt, plausibility at its distribution.
    disagreement: tell for each token how much they disagreed. live: `Engine.set_weights` may change
    the weights."""

    members: tuple[Member, ...]
    rule: Rule = Rule.MEAN
    plausibility: float = 0.0
    disagreement: bool = False
    live: bool = False


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafting by prompt lookup. draft_tokens: most in a step, 0 is off, None is the engine's
    default. min_ngram, max_ngram: newest tokens that are looked up; None is 2 and 4."""

    draft_tokens: int | None = None
    min_ngram: int | None = None
    max_ngram: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. deadline: `time.monotonic()` seconds, None for none. priority:
    higher goes first. salt: requests with different salts share no prefix cache. speculation: how
    fast, never what is answered. combination: instead of adapters. matcher: its constraint, for
    this request alone. sibling: id of a request with the same prompt, adapters and salt, submitted
    before: this one waits until that one's prompt is computed, and takes up its blocks. tenant:
    on whose behalf; tenants share the machine equally. max_wait: most seconds until the first
    token. tokenizer: of its adapters, in place of the engine's. user: of the tenant; a tenant's
    users share its part equally."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapters: tuple[AdapterRef, ...] = ()
    priority: int = 0
    deadline: float | None = None
    salt: str = ""
    speculation: Speculation = Speculation()
    combination: Combination | None = None
    matcher: Matcher | None = None
    sibling: str = ""
    tenant: str = ""
    max_wait: float | None = None
    tokenizer: Tokenizer | None = None
    user: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token, NaN for a prompt's first, and of the best ones at its position
    ((token id, logprob)). rank: one more than there are tokens with a greater one; 0 for a prompt's
    first, and if it was not asked for."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class TokenDisagreement:
    """How much a combination's members disagreed on one token. divergence: `combine.divergence`,
    nats. logprobs: what each member gave the token."""

    divergence: float
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """One adapter that answered, with its full digest; modules and patch as in `AdapterRef`."""

    name: str
    digest: str
    strength: float
    modules: tuple[str, ...] = ()
    patch: bool = False


@dataclass(frozen=True, slots=True)
class ServedMember:
    """One member of a combination that answered, with its weight at the start."""

    adapters: tuple[ServedAdapter, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a combination, the prompts of all members together; its tokens once."""

    prompt_tokens: int  # virtual tokens of a prefix not counted
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose keys and values came from the prefix cache
    prefix_tokens: int = 0  # virtual tokens of a prompt- or prefix-tuned adapter
    drafted_tokens: int = 0  # by prompt lookup
    accepted_tokens: int = 0  # of these, part of the completion


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds."""

    queue: float  # from submission to the first scheduled token, the adapter's load included
    adapter_load: float
    time_to_first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Output:
    """What one step adds to one request. The last one has `finish_reason`, `usage` and `timings`;
    a failed request's last one has `error` as well. `served_by` comes with the first one, and of a
    combination `members`. Disagreements are one per token, if they were asked for. weights: of a
    combination, if they have changed: the first token is the first that was chosen by them."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    served_by: tuple[ServedAdapter, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str = ""  # the stop string or token that ended it
    usage: Usage | None = None
    timings: Timings | None = None
    error: RequestError | None = None
    members: tuple[ServedMember, ...] = ()
    disagreements: tuple[TokenDisagreement, ...] = ()
    prompt_disagreements: tuple[TokenDisagreement, ...] = ()
    weights: tuple[float, ...] = ()


class Outbox(Protocol):
    """Where outputs go. Called on the engine thread, once per step with everything that is new:
    it must not block (hand over to a queue or an event loop)."""

    def deliver(self, outputs: list[Output]) -> None: ...


class AdapterState(StrEnum):
    REGISTERED = "registered"  # known, not in memory
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"  # gone; seen by watchers only
    FAILED = "failed"


class Tier(StrEnum):
    NONE = "none"
    DISK = "disk"
    CACHE = "cache"  # on disk as well, lowered
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One registered adapter as seen from outside. bytes are 0 while it is not resident; times are
    `time.time()` seconds, 0 for never."""

    name: str
    digest: str
    uri: str
    state: AdapterState
    tier: Tier
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
    parent: str = ""  # name of the adapter that it is relative to
    patch: bool = False  # it is part of every request
    own_tokenizer: bool = False  # or chat template
