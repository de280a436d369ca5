"""Messages -> what the engine takes. Every refusal names the field, what it holds, and what would
be right; what concerns the model (vocabulary, lengths, ranges) the engine checks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias, TypeVar

from google.protobuf.message import Message

from deltaserve.adapters.options import LoadOptions
from deltaserve.server.config import ADAPTER_NAME, NAME_RULE
from deltaserve.server.engine.constraint import KINDS, Constraint
from deltaserve.server.engine.core import AdapterRef, SamplingParams, Speculation
from deltaserve.server.errors import InvalidRequest, RequestError
from deltaserve.v1 import adapter_pb2
from deltaserve.v1 import generation_pb2 as pb

GenerateRequest: TypeAlias = pb.GenerateRequest | pb.GenerateStreamRequest
Asked: TypeAlias = GenerateRequest | pb.ScoreRequest
Targeted: TypeAlias = Asked | pb.CombinationMember
Number = TypeVar("Number", int, float)

MAX_CHOICES = 64
MAX_CONTINUATIONS = 256
MAX_PRIORITY = 1000
MAX_LABEL = 256
MAX_STOPS = 64
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIAS = 16384
MAX_BAD_WORDS = 1024
MAX_BAD_WORD = 256
MAX_CONSTRAINT = 1 << 18
MAX_ALTERNATIVES = 4096

_PATHS = {
    **{name: f"sampling.{name}" for name in pb.SamplingParams.DESCRIPTOR.fields_by_name},
    "max_tokens": "stop.max_tokens",
    "min_tokens": "stop.min_tokens",
    "stop": "stop.strings",
    "stop_token_ids": "stop.token_ids",
    "bad_tokens": "sampling.bad_token_sequences",
    "length_penalty.start": "sampling.length_penalty.start",
    "length_penalty.factor": "sampling.length_penalty.factor",
    "messages": "chat.messages",
    "variables_json": "chat.variables_json",
    **{name: f"speculation.{name}" for name in pb.Speculation.DESCRIPTOR.fields_by_name},
}
"""The engine's names of fields -> paths in the request."""


def refuse(field: str, found: str, right: str) -> NoReturn:
    """Raise InvalidRequest."""
    raise InvalidRequest(f"{field}: {found} is not possible; it must be {right}", field=field)


def in_request(error: InvalidRequest) -> InvalidRequest:
    """The same error with the path that the field has in a request."""
    error.field = _PATHS.get(error.field, error.field)
    return error


def adapters(request: Targeted, base: tuple[str, ...]) -> tuple[AdapterRef, ...]:
    """The adapters that the request names; none for the base. base: what that is called."""
    model = "" if request.model in base else request.model
    if model and request.adapters:
        refuse("adapters", f"a list beside model {_shown(model)}", "empty, or `model` must be")
    if model:
        return (AdapterRef(_text("model", model, MAX_LABEL)),)
    found = []
    for item in request.adapters:
        strength = item.strength if item.HasField("strength") else 1.0
        if not math.isfinite(strength):
            refuse("adapters.strength", str(strength), "a finite number")
        if not item.name:
            refuse("adapters.name", "''", "the name of a registered adapter")
        name = _text("adapters.name", item.name, MAX_LABEL)
        found.append(AdapterRef(name, strength, tuple(item.modules)))
    return tuple(found)


def sampling(request: GenerateRequest, choice: int = 0) -> SamplingParams:
    """The parameters of one of the n choices: each has a seed of its own."""
    given, stop = request.sampling, request.stop
    if len(stop.strings) > MAX_STOPS:
        refuse("stop.strings", f"{len(stop.strings)} strings", f"at most {MAX_STOPS}")
    if len(stop.token_ids) > MAX_STOP_TOKENS:
        refuse("stop.token_ids", f"{len(stop.token_ids)} tokens", f"at most {MAX_STOP_TOKENS}")
    if len(given.logit_bias) > MAX_LOGIT_BIAS:
        found = f"{len(given.logit_bias)} entries"
        refuse("sampling.logit_bias", found, f"at most {MAX_LOGIT_BIAS}")
    default = SamplingParams()
    return SamplingParams(
        max_tokens=_set(stop, "max_tokens", default.max_tokens),
        min_tokens=_set(stop, "min_tokens", default.min_tokens),
        temperature=_set(given, "temperature", default.temperature),
        top_p=_set(given, "top_p", default.top_p),
        top_k=_set(given, "top_k", default.top_k),
        min_p=_set(given, "min_p", default.min_p),
        repetition_penalty=_set(given, "repetition_penalty", default.repetition_penalty),
        presence_penalty=_set(given, "presence_penalty", default.presence_penalty),
        frequency_penalty=_set(given, "frequency_penalty", default.frequency_penalty),
        eos_ramp=_set(given, "eos_ramp", default.eos_ramp),
        length_penalty=(given.length_penalty.start, given.length_penalty.factor)
        if given.HasField("length_penalty")
        else default.length_penalty,
        logit_bias=tuple(sorted(given.logit_bias.items())),
        bad_tokens=_bad_tokens(given),
        seed=given.seed + choice if given.HasField("seed") else None,
        stop=tuple(stop.strings),
        stop_token_ids=tuple(stop.token_ids),
        ignore_eos=stop.ignore_eos,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        ranks=request.ranks,
        skip_special_tokens=not request.keep_special_tokens,
    )


def bad_words(request: GenerateRequest) -> Sequence[str]:
    """Texts whose tokens are not to be generated."""
    words = request.sampling.bad_words
    if len(words) > MAX_BAD_WORDS:
        refuse("sampling.bad_words", f"{len(words)} words", f"at most {MAX_BAD_WORDS}")
    for word in words:
        if not word.strip() or len(word) > MAX_BAD_WORD:
            found = repr(word) if len(word) <= MAX_BAD_WORD else f"text of {len(word)} characters"
            right = f"text of at most {MAX_BAD_WORD} characters that is not all spaces"
            refuse("sampling.bad_words", found, right)
        prompt_text(word, "sampling.bad_words")
    return words


def _bad_tokens(given: pb.SamplingParams) -> tuple[tuple[int, ...], ...]:
    found = given.bad_token_sequences
    if len(found) > MAX_BAD_WORDS:
        right = f"at most {MAX_BAD_WORDS}"
        refuse("sampling.bad_token_sequences", f"{len(found)} sequences", right)
    return tuple(tuple(item.ids) for item in found)


def constraint(request: GenerateRequest) -> Constraint | None:
    """What the text must be, if anything."""
    given = request.constraint
    kind = given.WhichOneof("kind")
    if kind is None:
        if request.HasField("constraint"):
            refuse("constraint", "an empty one", f"one of {', '.join(KINDS)}")
        return None
    field = f"constraint.{kind}"
    if kind == "json_object":
        if not given.json_object:
            refuse(field, "false", "true, or left out")
        return Constraint(kind)
    texts = tuple(given.choice.values) if kind == "choice" else (getattr(given, kind),)
    if not 1 <= len(texts) <= MAX_ALTERNATIVES:
        refuse(field, f"{len(texts)} texts", f"1 to {MAX_ALTERNATIVES}")
    size = sum(map(len, texts))
    if size > MAX_CONSTRAINT:
        refuse(field, f"text of {size} characters", f"at most {MAX_CONSTRAINT} characters")
    for text in texts:
        prompt_text(text, field)
    return Constraint(kind, texts=texts) if kind == "choice" else Constraint(kind, texts[0])


def speculation(request: GenerateRequest) -> Speculation:
    """What the request says of drafting; what it does not say is None."""
    given = request.speculation
    return Speculation(**{field.name: value for field, value in given.ListFields()})


def max_wait(request: Asked) -> float | None:
    """Seconds until the first token; None for the server's default."""
    return request.max_wait_seconds if request.HasField("max_wait_seconds") else None


def named(request: Asked, base: tuple[str, ...]) -> list[tuple[str, str]]:
    """What the request calls its adapters, those of a combination's members as well, each with the
    path of its field."""
    of: list[tuple[str, Any]] = [("", request)]
    of += [(f"combination.members[{i}].", m) for i, m in enumerate(request.combination.members)]
    found = []
    for path, one in of:
        found.append((f"{path}model", one.model))
        found += [(f"{path}adapters.name", item.name) for item in one.adapters]
    return [(field, name) for field, name in found if name and name not in base]


@contextmanager
def blaming(request: Asked) -> Iterator[None]:
    """The engine says `model` of whatever names adapters; the client is told its own field."""
    try:
        yield
    except RequestError as error:
        found = _MODEL.fullmatch(error.field)
        if found is not None:
            i = found["member"]
            given: Targeted = request if i is None else request.combination.members[int(i)]
            if given.adapters and not given.model:
                renamed = f"{found['path']}adapters.name"
                error.args = (str(error).replace(f"{error.field}: ", f"{renamed}: ", 1),)
                error.field = renamed
        raise


_MODEL = re.compile(r"(?P<path>(combination\.members\[(?P<member>\d+)\]\.)?)model")


def check_labels(request: Asked) -> None:
    """The fields that are only passed on."""
    for name in ("user", "cache_salt", "request_id"):
        _text(name, getattr(request, name), MAX_LABEL)
    if abs(request.priority) > MAX_PRIORITY:
        refuse("priority", str(request.priority), f"from {-MAX_PRIORITY} to {MAX_PRIORITY}")


def prompt_text(text: str, field: str = "text") -> str:
    """Text to encode: there is some, and no NUL in it."""
    if not text:
        refuse(field, "''", "text that is not empty")
    if "\0" in text:
        refuse(field, f"NUL at character {text.index(chr(0))}", "text without NUL")
    return text


def continuations(request: pb.ScoreRequest) -> Sequence[pb.Continuation]:
    """What is to be scored; each has content."""
    found = request.continuations
    if not 1 <= len(found) <= MAX_CONTINUATIONS:
        refuse("continuations", f"{len(found)} of them", f"1 to {MAX_CONTINUATIONS}")
    for item in found:
        kind = item.WhichOneof("content")
        if kind == "text":
            prompt_text(item.text, "continuations.text")
        elif not item.token_ids.ids:
            refuse("continuations", "an empty one", "text or token ids")
    return found


def adapter_name(name: str, base: tuple[str, ...]) -> str:
    """A name for a new adapter."""
    if not ADAPTER_NAME.fullmatch(name):
        raise InvalidRequest(f"name: {_shown(name)} is not possible; {NAME_RULE}", field="name")
    if name in base:
        refuse("name", _shown(name), "another than the base model's")
    return name


def uri(text: str) -> str:
    """Where a new adapter is."""
    if not text:
        refuse("uri", "''", "a folder inside an adapter root of the server")
    return _text("uri", text, 4096)


def load_options(given: adapter_pb2.LoadOptions) -> LoadOptions:
    """How a new adapter is to be read."""
    if not 0 <= given.max_error < 1:  # also what is not a number
        refuse("options.max_error", f"{given.max_error:g}", "at least 0 and below 1")
    return LoadOptions(
        allow_base_mismatch=given.allow_base_mismatch,
        task_id=given.task_id if given.HasField("task_id") else None,
        max_error=given.max_error,
        parent=_text("options.parent", given.parent, MAX_LABEL),
    )


def label(field: str, text: str) -> str:
    """A short text of one line."""
    return _text(field, text, MAX_LABEL)


def _set(message: Message, field: str, default: Number) -> Number:
    value: Number = getattr(message, field) if message.HasField(field) else default
    return value


def _text(field: str, text: str, most: int) -> str:
    if len(text) > most:
        refuse(field, f"text of {len(text)} characters", f"at most {most} characters")
    if not text.isprintable():
        refuse(field, _shown(text), "text without control characters")
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:63] + "…")
