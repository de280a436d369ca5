"""Python arguments -> request messages, the same for both clients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Required, TypeAlias, TypedDict, TypeVar, cast

import grpc

from deltaserve.clients.errors import InvalidArgument
from deltaserve.v1 import adapter_pb2
from deltaserve.v1 import generation_pb2 as pb

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation of ``{"role": ..., "content": ...}``, with ``name``,
``tool_calls`` (a list of mappings) and ``tool_call_id`` where the model's template reads them."""


class Weighted(TypedDict, total=False):
    """An adapter by its name. strength: of its change, 1 if left out. modules: patterns such as
    ``*.q_proj`` of the modules that it acts on alone."""

    name: Required[str]
    strength: float
    modules: Sequence[str]


Adapters: TypeAlias = Mapping[str, float] | Iterable[str | tuple[str, float] | Weighted]
"""Names, (name, strength) pairs, `Weighted` ones, or a mapping of name to strength."""


class CombinationMember(TypedDict, total=False):
    """One of the distributions: an adapter (model) or several, neither for the base. weight: 1 if
    left out. prompt: what it continues instead of the request's prompt."""

    model: str
    adapters: Adapters
    weight: float
    prompt: Prompt


class Combination(TypedDict, total=False):
    """Members' distributions as one, token by token; a name stands for a member of weight 1.
    `generation.proto` explains each field."""

    members: Required[Sequence[str | CombinationMember]]
    rule: Required[Literal["mean", "product"]]
    plausibility: float
    disagreement: bool
    live: bool


class LoadOptions(TypedDict, total=False):
    """How an adapter's files are to be read; `adapter.proto` explains each field."""

    allow_base_mismatch: bool
    task_id: int | None
    max_error: float
    parent: str


class Speculation(TypedDict, total=False):
    """Drafting by prompt lookup; `generation.proto` explains each field."""

    draft_tokens: int
    min_ngram: int
    max_ngram: int


class Options(TypedDict, total=False):
    """What else a generation takes; `generation.proto` explains each field. stop: one or several
    texts that end it. tools, template_variables: for the chat template of a conversation.
    json_schema (as text or as what `json` makes of it), json_object, regex, grammar (Lark), choice:
    what the text must be; one of them. timeout: seconds until DeadlineExceeded."""

    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    eos_ramp: float
    seed: int
    logit_bias: Mapping[int, float]
    tools: Sequence[Mapping[str, Any]]
    template_variables: Mapping[str, Any]
    json_schema: str | Mapping[str, Any] | bool
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]
    bad_words: Sequence[str]
    bad_token_sequences: Sequence[Sequence[int]]
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    n: int
    best_of: int
    echo: bool
    prompt_logprobs: int
    user: str
    priority: int
    max_wait_seconds: float
    cache_salt: str
    keep_special_tokens: bool
    request_id: str
    combination: Combination
    speculation: Speculation
    timeout: float


Generate = TypeVar("Generate", pb.GenerateRequest, pb.GenerateStreamRequest)
Prompted = TypeVar(
    "Prompted",
    pb.GenerateRequest,
    pb.GenerateStreamRequest,
    pb.ScoreRequest,
    pb.TokenizeRequest,
    pb.CombinationMember,
)
_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "eos_ramp",
    "seed",
)
_CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice")
_PLAIN = (
    "n",
    "best_of",
    "echo",
    "prompt_logprobs",
    "user",
    "priority",
    "max_wait_seconds",
    "cache_salt",
    "keep_special_tokens",
    "request_id",
)


@contextmanager
def _refused(method: str) -> Iterator[None]:
    """A number that its field cannot hold, or text that is not Unicode, is refused as the server
    would refuse it."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"{method}: {error}", grpc.StatusCode.INVALID_ARGUMENT) from error


def put_prompt(request: Prompted, prompt: Prompt | None) -> Prompted:
    """Fill in the request's prompt, by its type; None leaves it out."""
    if prompt is None:
        return request
    if isinstance(prompt, str):
        request.text = prompt
        return request
    items = list(prompt)
    if items and isinstance(items[0], Mapping):
        request.chat.SetInParent()
        for turn in items:
            request.chat.messages.add(**_message(turn))  # type: ignore[arg-type]
    elif isinstance(request, pb.TokenizeRequest):
        raise TypeError("prompt: token ids are tokens already; give text or a conversation")
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(items)  # type: ignore[arg-type]
    return request


def _message(turn: Message) -> dict[str, Any]:
    given = dict(turn)
    calls = given.pop("tool_calls", None)
    return given if calls is None else {**given, "tool_calls_json": json.dumps(calls)}


def weighted(adapters: Adapters | None) -> list[pb.WeightedAdapter]:
    """Every way to name adapters -> messages."""
    if isinstance(adapters, str):
        raise TypeError("adapters: give a list of names; one name goes into `model`")
    pairs = adapters.items() if isinstance(adapters, Mapping) else adapters or ()
    return [_weighted(item) for item in pairs]


def _weighted(item: str | tuple[str, float] | Weighted) -> pb.WeightedAdapter:
    if isinstance(item, str):
        return pb.WeightedAdapter(name=item)
    if not isinstance(item, Mapping):
        name, strength = item
        return pb.WeightedAdapter(name=name, strength=strength)
    unknown = set(item) - set(Weighted.__annotations__)
    if unknown or "name" not in item or isinstance(item.get("modules"), str):
        raise TypeError(
            f"adapters: {dict(item)} is not possible; give name, strength and a list of modules"
        )
    return pb.WeightedAdapter(**item)


def combined(combination: Combination | None) -> pb.Combination | None:
    """Members and their rule -> a message."""
    if combination is None:
        return None
    given = cast(dict[str, Any], combination)
    _check_keys("combination", given, Combination)
    if given.get("rule") not in ("mean", "product"):
        raise TypeError(f"combination: rule {given.get('rule')!r} must be 'mean' or 'product'")
    members = given.get("members")
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise TypeError(f"combination: members {members!r} must be a list")
    message = pb.Combination(
        members=[_member({"model": m} if isinstance(m, str) else m) for m in members],
        rule=f"COMBINATION_RULE_{given['rule'].upper()}",
        disagreement=given.get("disagreement", False),
        live=given.get("live", False),
    )
    if "plausibility" in given:
        message.plausibility = given["plausibility"]
    return message


def _member(given: CombinationMember) -> pb.CombinationMember:
    _check_keys("combination.members", cast(dict[str, Any], given), CombinationMember)
    message = pb.CombinationMember(
        model=given.get("model", ""), adapters=weighted(given.get("adapters"))
    )
    if "weight" in given:
        message.weight = given["weight"]
    return put_prompt(message, given.get("prompt"))


def _check_keys(field: str, given: Mapping[str, Any], kind: Any) -> None:
    unknown = set(given) - set(kind.__annotations__)
    if unknown:
        known = sorted(kind.__annotations__)
        raise TypeError(f"{field}: unknown {sorted(unknown)[0]!r}; known: {known}")


def load(
    name: str,
    uri: str,
    pinned: bool,
    wait: bool,
    register_only: bool,
    shared: bool,
    options: LoadOptions,
) -> adapter_pb2.LoadAdapterRequest:
    """A LoadAdapterRequest."""
    unknown = set(options) - set(LoadOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"unknown option {sorted(unknown)[0]!r}; known: {sorted(LoadOptions.__annotations__)}"
        )
    with _refused("load_adapter"):
        return adapter_pb2.LoadAdapterRequest(
            name=name,
            uri=uri,
            pinned=pinned,
            return_early=not wait,
            register_only=register_only,
            shared=shared,
            options=adapter_pb2.LoadOptions(**options),
        )


def generate(
    kind: type[Generate],
    prompt: Prompt | None,
    model: str,
    adapters: Adapters | None,
    max_tokens: int,
    temperature: float,
    logprobs: bool | int,
    ignore_eos: bool,
    options: Options,
) -> Generate:
    """A GenerateRequest or GenerateStreamRequest."""
    given = cast(dict[str, Any], options)
    unknown = set(given) - set(Options.__annotations__)
    if unknown:
        raise TypeError(
            f"unknown option {sorted(unknown)[0]!r}; known: {sorted(Options.__annotations__)}"
        )
    with _refused("generate"):
        request = kind(
            model=model,
            adapters=weighted(adapters),
            combination=combined(options.get("combination")),
        )
        put_prompt(request, prompt)
        request.sampling.temperature = temperature
        for name in _SAMPLING:
            if given.get(name) is not None:
                setattr(request.sampling, name, given[name])
        request.sampling.logit_bias.update(options.get("logit_bias") or {})
        request.sampling.bad_words.extend(_texts("bad_words", options.get("bad_words")))
        for sequence in options.get("bad_token_sequences") or ():
            request.sampling.bad_token_sequences.add(ids=sequence)
        stop = options.get("stop") or ()
        request.stop.max_tokens = max_tokens
        request.stop.min_tokens = options.get("min_tokens") or 0
        request.stop.strings.extend([stop] if isinstance(stop, str) else stop)
        request.stop.token_ids.extend(options.get("stop_token_ids") or ())
        request.stop.ignore_eos = ignore_eos
        for name in _PLAIN:
            if given.get(name) is not None:
                setattr(request, name, given[name])
        for name in ("tools", "template_variables"):
            if given.get(name) is None:
                continue
            if request.WhichOneof("prompt") != "chat":
                raise TypeError(f"{name}: give it with a conversation")
            field = "tools_json" if name == "tools" else "variables_json"
            setattr(request.chat, field, json.dumps(given[name]))
        _constrain(request, given)
        if options.get("speculation") is not None:
            request.speculation.CopyFrom(_speculation(options["speculation"]))
        if logprobs is not False:
            request.logprobs = 0 if logprobs is True else logprobs
        return request


def _constrain(request: Generate, given: Mapping[str, Any]) -> None:
    kinds = [kind for kind in _CONSTRAINTS if given.get(kind) is not None]
    if len(kinds) > 1:
        raise TypeError(f"{kinds[0]} and {kinds[1]}: give one of {', '.join(_CONSTRAINTS)}")
    for kind in kinds:
        value = given[kind]
        if kind == "choice":
            request.constraint.choice.values.extend(_texts(kind, value))
            request.constraint.choice.SetInParent()
        elif kind == "json_schema" and not isinstance(value, str):
            request.constraint.json_schema = json.dumps(value)
        else:
            setattr(request.constraint, kind, value)


def _texts(field: str, given: Sequence[str] | None) -> Sequence[str]:
    if isinstance(given, str):
        raise TypeError(f"{field}: give a list of texts")
    return given or ()


def _speculation(given: Speculation) -> pb.Speculation:
    if not isinstance(given, Mapping) or set(given) - set(Speculation.__annotations__):
        known = sorted(Speculation.__annotations__)
        raise TypeError(f"speculation: {given!r} is not possible; give a mapping of {known}")
    return pb.Speculation(**given)


def score(
    prompt: Prompt | None,
    continuations: Sequence[str | Sequence[int]],
    model: str,
    adapters: Adapters | None,
    fields: Mapping[str, Any],
) -> pb.ScoreRequest:
    """A ScoreRequest."""
    with _refused("score"):
        if isinstance(continuations, str):
            raise TypeError("continuations: give a list of texts or of token ids")
        rest = {**fields, "combination": combined(fields.get("combination"))}
        request = pb.ScoreRequest(model=model, adapters=weighted(adapters), **rest)
        put_prompt(request, prompt)
        for content in continuations:
            if isinstance(content, str):
                request.continuations.add(text=content)
            else:
                request.continuations.add(token_ids=pb.TokenIds(ids=content))
        return request


def set_weights(request_id: str, weights: Sequence[float]) -> pb.SetWeightsRequest:
    """A SetWeightsRequest."""
    with _refused("set_weights"):
        return pb.SetWeightsRequest(request_id=request_id, weights=weights)


def tokenize(prompt: Prompt, model: str) -> pb.TokenizeRequest:
    """A TokenizeRequest."""
    with _refused("tokenize"):
        return put_prompt(pb.TokenizeRequest(model=model), prompt)


def detokenize(token_ids: Sequence[int], model: str) -> pb.DetokenizeRequest:
    """A DetokenizeRequest."""
    with _refused("detokenize"):
        return pb.DetokenizeRequest(token_ids=token_ids, model=model)
