"""TGIS's parameters -> a request of `deltaserve.v1`, with TGIS's defaults. What cannot be done is
refused by the name that the field has there."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from deltaserve.server.errors import InvalidRequest, RequestError
from deltaserve.server.service.convert import refuse
from deltaserve.tgis import generation_pb2 as tgis
from deltaserve.v1 import generation_pb2 as pb

MAX_NEW_TOKENS = 20
"""TGIS's default."""
MAX_BATCH = 1024

_PATHS = {
    "model": "adapter_id",
    "prompt": "request.text",
    "text": "request.text",
    "token_ids": "request.text",
    "token_ids.ids": "request.text",
    "request_id": "x-correlation-id",
    "logprobs": "params.response.top_n_tokens",
    "prompt_logprobs": "params.response.top_n_tokens",
    "truncate_input_tokens": "params.truncate_input_tokens",
    "stop.max_tokens": "params.stopping.max_new_tokens",
    "stop.min_tokens": "params.stopping.min_new_tokens",
    "stop.strings": "params.stopping.stop_sequences",
    **{
        f"sampling.{name}": f"params.sampling.{name}"
        for name in tgis.SamplingParameters.DESCRIPTOR.fields_by_name
    },
    "sampling.repetition_penalty": "params.decoding.repetition_penalty",
    "sampling.length_penalty.start": "params.decoding.length_penalty.start_index",
    "sampling.length_penalty.factor": "params.decoding.length_penalty.decay_factor",
    "constraint": "params.decoding.guided",
    "constraint.json_object": "params.decoding.format",
    **{
        f"constraint.{name}": f"params.decoding.{name}"
        for name in ("json_schema", "regex", "choice", "grammar")
    },
}
"""Paths in a request of `deltaserve.v1` -> in one of TGIS."""

_NAME = re.compile(r"[\w.]+")
"""What a message begins with that names its field."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What TGIS does with an answer. stop_sequence: it is part of the text. seed: that the answer
    is drawn with; 0 if it is not drawn. limit: tokens that the request asks for. seconds: after so
    many it ends; None for no such limit."""

    input_text: bool
    input_tokens: bool
    generated_tokens: bool
    logprobs: bool
    ranks: bool
    stop_sequence: bool
    seed: int
    limit: int
    seconds: float | None


def adapter(
    request: tgis.BatchedGenerationRequest
    | tgis.SingleGenerationRequest
    | tgis.BatchedTokenizeRequest,
) -> str:
    """The adapter's name, in either of its two fields; empty for the base."""
    old, new = request.prefix_id, request.adapter_id
    if old and new and old != new:
        refuse("prefix_id", f"another one than adapter_id, {new[:64]!r},", "left out")
    return new or old


def wanted(params: tgis.Parameters) -> Wanted:
    """What is to be answered. Raises InvalidRequest."""
    shown, stopping = params.response, params.stopping
    details = shown.token_logprobs or shown.token_ranks or shown.top_n_tokens
    if details and not (shown.input_tokens or shown.generated_tokens):
        raise InvalidRequest(
            "params.response: token_logprobs, token_ranks and top_n_tokens tell of tokens, and "
            "none are asked for; set generated_tokens, input_tokens or both",
            field="params.response",
        )
    include = not stopping.HasField("include_stop_sequence") or stopping.include_stop_sequence
    return Wanted(
        input_text=shown.input_text,
        input_tokens=shown.input_tokens,
        generated_tokens=shown.generated_tokens,
        logprobs=shown.token_logprobs,
        ranks=shown.token_ranks,
        stop_sequence=include,
        seed=_seed(params),
        limit=stopping.max_new_tokens or MAX_NEW_TOKENS,
        seconds=stopping.time_limit_millis / 1000 or None,
    )


def generate(
    params: tgis.Parameters, asked: Wanted, model: str, ids: Sequence[int], request_id: str
) -> pb.GenerateStreamRequest:
    """model: an adapter's name, or empty. ids: of the prompt. Raises InvalidRequest."""
    shown = params.response
    top = shown.top_n_tokens if asked.logprobs or asked.ranks or shown.top_n_tokens else None
    return pb.GenerateStreamRequest(
        model=model,
        token_ids=pb.TokenIds(ids=ids),
        sampling=_sampling(params, asked.seed),
        stop=pb.StopParams(
            max_tokens=asked.limit,
            min_tokens=params.stopping.min_new_tokens,
            strings=params.stopping.stop_sequences,
        ),
        logprobs=top if shown.generated_tokens else None,
        prompt_logprobs=top if shown.input_tokens else None,
        ranks=asked.ranks,
        constraint=_constraint(params.decoding),
        request_id=request_id,
    )


@contextmanager
def named_by_tgis(text: str) -> Iterator[None]:
    """What is raised inside has TGIS's name for the field. text: the prompt's."""
    try:
        yield
    except RequestError as error:
        path = _PATHS.get(error.field, error.field)
        path = text if path == "request.text" else path
        head, colon, rest = str(error).partition(": ")
        if colon and error.field and _NAME.fullmatch(head):
            error.args = (f"{path}: {rest}",)
        error.field = path
        raise


def _seed(params: tgis.Parameters) -> int:
    if not _draws(params):
        return 0
    return params.sampling.seed if params.sampling.HasField("seed") else secrets.randbits(32)


def _draws(params: tgis.Parameters) -> bool:
    given = params.sampling
    zero = given.HasField("temperature") and given.temperature == 0
    return params.method == tgis.SAMPLE and not zero


def _sampling(params: tgis.Parameters, seed: int) -> pb.SamplingParams:
    """sampling is looked at only where TGIS does: if the method is to sample."""
    decoding, given = params.decoding, params.sampling
    if params.method not in (tgis.GREEDY, tgis.SAMPLE):
        refuse("params.method", str(params.method), "GREEDY or SAMPLE")
    found = pb.SamplingParams(repetition_penalty=decoding.repetition_penalty or 1.0)
    if decoding.HasField("length_penalty"):
        found.length_penalty.start = decoding.length_penalty.start_index
        found.length_penalty.factor = decoding.length_penalty.decay_factor
    if params.method == tgis.GREEDY:
        return found
    if given.typical_p not in (0, 1):
        shown = f"{given.typical_p:g}"
        refuse("params.sampling.typical_p", shown, "left out: this server does not have it")
    found.temperature = given.temperature if given.HasField("temperature") else 1.0
    found.top_k = given.top_k
    found.top_p = given.top_p or 1.0
    if _draws(params):
        found.seed = seed
    return found


def _constraint(decoding: tgis.DecodingParameters) -> pb.Constraint | None:
    kind = decoding.WhichOneof("guided")
    if kind == "format":
        if decoding.format not in (tgis.DecodingParameters.TEXT, tgis.DecodingParameters.JSON):
            refuse("params.decoding.format", str(decoding.format), "TEXT or JSON")
        json = decoding.format == tgis.DecodingParameters.JSON
        return pb.Constraint(json_object=True) if json else None
    if kind == "json_schema":
        return pb.Constraint(json_schema=decoding.json_schema)
    if kind == "regex":
        return pb.Constraint(regex=decoding.regex)
    if kind == "grammar":
        return pb.Constraint(grammar=decoding.grammar)
    if kind == "choice":
        return pb.Constraint(choice=pb.StringList(values=decoding.choice.choices))
    return None
