"""The fields of a request -> the message that asks the same of our services."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf import json_format
from google.protobuf.message import Message

from deltaserve.server.engine.stats import EngineInfo
from deltaserve.server.errors import InvalidRequest
from deltaserve.server.http import constraints, conversation, refused, tools
from deltaserve.server.http.answers import Stops
from deltaserve.server.http.body import shown
from deltaserve.server.http.fields import ChatFields, CompletionFields, Sampled
from deltaserve.server.http.refused import refuse
from deltaserve.server.http.tools import Demanded
from deltaserve.v1 import generation_pb2 as pb

GenerateMessage: TypeAlias = pb.GenerateRequest | pb.GenerateStreamRequest

COMPLETION_TOKENS = 16
"""max_tokens of a completion that does not say, as with OpenAI. A chat goes on to the end of the
context."""
TEMPERATURE = 1.0
"""As with OpenAI; gRPC's default is 0."""
MAX_PROMPTS = 1024
MAX_CHOICES = 1024
"""Of all prompts of one request together. It is taken in by one step of the event loop, in which
nobody else is served."""
_SAMPLING = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True)
class Asked:
    """messages: one for each prompt. id: of the answer. names: what the client calls fields.
    demanded: the tools that must be called. The rest is as the client gave it, or its default."""

    messages: Sequence[GenerateMessage]
    id: str
    model: str
    names: Mapping[str, str]
    stops: Stops
    demanded: Demanded | None = None

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        first = self.messages[0]
        return first.n if first.HasField("n") else 1


def completion(given: CompletionFields, id: str, info: EngineInfo) -> Asked:
    """One message for each prompt. Raises InvalidRequest."""
    refused.check(given, template=False)
    names: dict[str, str] = {}
    found = _prompts(given.prompt)
    _check_choices(given, len(found))
    made = []
    for i, prompt in enumerate(found):
        message = _message(given, info, names, given.max_tokens, COMPLETION_TOKENS)
        message.request_id = id if len(found) == 1 else f"{id}-{i}"
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.ids.extend(prompt)
        _set(message, "best_of", given.best_of)
        _set(message, "logprobs", given.logprobs)
        message.echo = bool(given.echo)
        made.append(message)
    return Asked(made, id, _answers(given, info), names, _stops(given))


def chat(given: ChatFields, id: str, info: EngineInfo) -> Asked:
    """Raises InvalidRequest."""
    refused.check(given, template=True)
    names = {"prompt": "messages", "text": "messages", "logprobs": "top_logprobs"}
    most = given.max_completion_tokens
    if most is not None:
        names["stop.max_tokens"] = names["max_tokens"] = "max_completion_tokens"
    message = _message(
        given, info, names, given.max_tokens if most is None else most, info.max_length
    )
    message.request_id = id
    message.chat.CopyFrom(conversation.to_message(given))
    if given.logprobs:
        message.logprobs = given.top_logprobs or 0
    elif given.top_logprobs:
        refuse("top_logprobs", f"{given.top_logprobs} without logprobs", "with logprobs: true")
    demanded = tools.demanded(given, given.parallel_tool_calls)
    if demanded is not None:
        if message.HasField("constraint"):
            refuse("tool_choice", "one beside a constraint of the answer", "'auto' or 'none'")
        message.constraint.json_schema = conversation.to_json("tools", demanded.schema)
        names["constraint.json_schema"] = "tools"
    return Asked([message], id, _answers(given, info), names, _stops(given), demanded)


def _answers(given: Sampled, info: EngineInfo) -> str:
    """The model that the answer is said to be of: of the base's names the first, as with vLLM."""
    return given.model if given.model and given.model not in info.names else info.base


def _stops(given: Sampled) -> Stops:
    strings = [given.stop] if isinstance(given.stop, str) else given.stop or ()
    return Stops(frozenset(strings), frozenset(given.stop_token_ids or ()))


def _prompts(given: Any) -> Sequence[str | Sequence[int]]:
    right = "text, token ids, or a list of either"
    if isinstance(given, str) or _ids(given):
        return [given]
    if not isinstance(given, list) or not given:
        refuse("prompt", shown(given), right)
    if len(given) > MAX_PROMPTS:
        refuse("prompt", f"{len(given)} prompts", f"at most {MAX_PROMPTS}")
    for i, one in enumerate(given):
        if not (isinstance(one, str) or _ids(one)):
            refuse(f"prompt.{i}", shown(one), right)
    return given


def _check_choices(given: CompletionFields, prompts: int) -> None:
    """What one prompt may have is checked by our services."""
    field = "n" if given.best_of is None else "best_of"
    each = (given.n if given.best_of is None else given.best_of) or 1
    if prompts > 1 and each * prompts > MAX_CHOICES:
        right = f"at most {MAX_CHOICES} choices of all prompts together"
        refuse(field, f"{each} for each of {prompts} prompts", right)


def _ids(given: Any) -> bool:
    """Whether it is token ids, at least one."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(type(i) is int and 0 <= i < 1 << 32 for i in given)
    )


def _message(
    given: Sampled,
    info: EngineInfo,
    names: dict[str, str],
    max_tokens: int | None,
    default_tokens: int,
) -> GenerateMessage:
    """All but the prompt and the log-probabilities."""
    message = pb.GenerateStreamRequest() if given.stream else pb.GenerateRequest()
    _target(given, message, info.names)
    sampling, stop = message.sampling, message.stop
    sampling.temperature = TEMPERATURE if given.temperature is None else given.temperature
    for field in (*_SAMPLING, "seed", "eos_ramp"):
        _set(sampling, field, getattr(given, field))
    if given.top_k is not None:
        sampling.top_k = max(given.top_k, 0)
    for token, bias in (given.logit_bias or {}).items():
        if not (token.isascii() and token.isdecimal() and int(token) < 1 << 32):
            refuse("logit_bias", shown(token), "the id of a token, as text")
        sampling.logit_bias[int(token)] = bias
    sampling.bad_words.extend(given.bad_words or ())
    for ids in given.bad_token_sequences or ():
        sampling.bad_token_sequences.add(ids=ids)
    stop.max_tokens = default_tokens if max_tokens is None else max_tokens
    _set(stop, "min_tokens", given.min_tokens)
    stop.strings.extend([given.stop] if isinstance(given.stop, str) else given.stop or ())
    stop.token_ids.extend(given.stop_token_ids or ())
    stop.ignore_eos = bool(given.ignore_eos)
    for field in ("n", "prompt_logprobs", "max_wait_seconds"):
        _set(message, field, getattr(given, field))
    message.ranks = given.prompt_logprobs is not None  # which tells them, with vLLM
    message.user = given.user or given.safety_identifier or ""
    message.priority = -(given.priority or 0)  # the lowest goes first, with vLLM
    message.cache_salt = given.cache_salt or ""
    message.keep_special_tokens = given.skip_special_tokens is False
    constraint, field = constraints.to_message(given)
    if constraint is not None:
        message.constraint.CopyFrom(constraint)
        names[f"constraint.{constraint.WhichOneof('kind')}"] = field
    if given.speculation is not None:
        from_json("speculation", given.speculation, message.speculation)
    if given.stream and given.prompt_logprobs is not None:
        refuse("prompt_logprobs", "a number in a stream", "left out, or `stream` must be")
    return message


def _target(given: Sampled, message: GenerateMessage, base: tuple[str, ...]) -> None:
    """OpenAI's clients always send a model: beside adapters or a combination it is the base."""
    message.model = given.model or ""
    if given.adapters is None and given.combination is None:
        return
    if message.model in base:
        message.model = ""
    if isinstance(given.adapters, dict):
        for name, strength in given.adapters.items():
            message.adapters.add(name=name, strength=strength)
    else:
        for one in given.adapters or ():
            from_json("adapters", one, message.adapters.add())
    if given.combination is not None:
        from_json("combination", given.combination, message.combination)


def from_json(field: str, given: dict[str, Any], message: Message) -> None:
    """By protobuf's own mapping. Raises InvalidRequest."""
    try:
        json_format.ParseDict(given, message, max_recursion_depth=16)
    except (json_format.ParseError, RecursionError) as error:
        name = message.DESCRIPTOR.name
        text = f"{field}: {shown(given)} is not possible; it must be a {name}: {error}"
        raise InvalidRequest(text, field=field) from None


def _set(message: Message, field: str, value: Any) -> None:
    if value is not None:
        setattr(message, field, value)
