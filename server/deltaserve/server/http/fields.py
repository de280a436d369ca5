"""The fields of requests, as OpenAI, vLLM and we name them; docs/http.md tells of each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from deltaserve.server.service.convert import MAX_PRIORITY

Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]


class Given(BaseModel):
    """Unknown fields are let through, as clients send ever new ones; those that are known and not
    supported are in `refused.REFUSED`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Given):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(Given):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 65)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Number] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    response_format: dict[str, Any] | None = None

    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Count] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Count | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    request_id: str | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None

    # ours
    adapters: dict[str, Number] | list[dict[str, Any]] | None = None
    combination: dict[str, Any] | None = None
    speculation: dict[str, Any] | None = None
    bad_token_sequences: list[list[Count]] | None = None
    eos_ramp: Number | None = None
    max_wait_seconds: Number | None = None


class CompletionFields(Sampled):
    """Of /v1/completions. prompt: text, token ids, or a list of either."""

    prompt: Any = None
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Count | None = None


class Conversation(Given):
    """What a chat template gets."""

    messages: list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


class ChatFields(Conversation, Sampled):
    """Of /v1/chat/completions."""

    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None


class LoadFields(Given):
    """Of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    pinned: bool | None = None
    register_only: bool | None = None
    options: dict[str, Any] | None = None


class UnloadFields(Given):
    """Of /v1/unload_lora_adapter."""

    lora_name: str


class TextFields(Conversation):
    """Of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    return_token_strs: bool | None = None


class TokensFields(Given):
    """Of /detokenize."""

    model: str | None = None
    tokens: list[Count]
