"""Fields that would change the answer and are not supported: refused, never ignored."""

from __future__ import annotations

from typing import Any, NoReturn

from deltaserve.server.errors import InvalidRequest
from deltaserve.server.http.body import shown
from deltaserve.server.http.fields import Given

REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "continue_final_message": (False,),
    "chat_template": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "structural_tag": (),
    "guided_whitespace_pattern": (),
    "return_token_ids": (False,),
    "prompt_embeds": (),
}
"""By name, the values that say nothing; null is one for all of them."""


def refuse(field: str, found: str, right: str) -> NoReturn:
    """Raise InvalidRequest."""
    raise InvalidRequest(f"{field}: {found} is not possible; it must be {right}", field=field)


def check(given: Given, *, template: bool) -> None:
    """Raise InvalidRequest for the first field that is known and not supported. template: the text
    is a chat template's, which has its special tokens itself; else the tokenizer adds them."""
    for field, value in (given.model_extra or {}).items():
        harmless = (not template,) if field == "add_special_tokens" else REFUSED.get(field)
        if value is None or harmless is None:
            continue
        if not any(type(value) is type(one) and value == one for one in harmless):
            right = "left out: this server does not support it"
            refuse(field, shown(value), right)
