"""Text: a tokenizer and its chat template, as the server uses them."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from deltaserve.server.engine.chat import Chat
from deltaserve.server.engine.matcher import Grammars
from deltaserve.server.errors import InvalidRequest

RESERVED = (
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    | inspect.signature(render_jinja_template).parameters.keys()
    | {"messages"}
) - {"documents"}
"""Names that no variable of a template may have: they are parameters of transformers."""

Render: TypeAlias = Callable[[str, Chat, Mapping[str, Any], int], str]
"""template, conversation, variables, most characters -> text."""

MOST_CHARACTERS = 1 << 26


class Text:
    """Encoding, chat templates, decoding. Safe to call from any thread.

    folder: with the tokenizer's files. render: renders templates that are not to be trusted; None
    renders here, in transformers' sandbox.
    """

    def __init__(self, folder: str | Path, render: Render | None = None) -> None:
        self.folder = Path(folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._render = render
        self.backend: Tokenizer | None = getattr(self._tokenizer, "backend_tokenizer", None)
        self.vocab_size = len(self._tokenizer)
        self.eos_token_id: int | None = self._tokenizer.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    @property
    def trusted(self) -> bool:
        """It is the base's, not one that an adapter brings."""
        return self._render is None

    @cached_property
    def description(self) -> str:
        """Digest of what it does: equal for tokenizers that do the same. What training sets in a
        tokenizer's files changes nothing here: padding, truncation."""
        whole = json.loads(self.backend.to_str()) if self.backend is not None else {}
        whole["padding"] = whole["truncation"] = None
        special = {k: str(v) for k, v in self._tokenizer.special_tokens_map.items()}
        special.pop("pad_token", None)
        told = [whole, self._tokenizer.chat_template, sorted(special.items())]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def take_template(self, other: Text) -> None:
        """Use the other's chat template."""
        self._tokenizer.chat_template = other._tokenizer.chat_template

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls them; empty for ids that it has no name for."""
        return [name or "" for name in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Which characters of the text each of its tokens is made of, from first to one behind the
        last; (0, 0) for special tokens. Raises InvalidRequest if the tokenizer cannot tell."""
        if not self._tokenizer.is_fast:
            raise InvalidRequest("this model's tokenizer cannot tell its tokens' offsets")
        found: list[tuple[int, int]] = self._tokenizer(
            text, return_offsets_mapping=True
        ).offset_mapping
        return found

    def grammars(self, vocabulary: int, eos: Iterable[int]) -> Grammars:
        """What compiles constraints for it. vocabulary, eos: of the model. Slow."""
        return Grammars(self.backend, vocabulary, eos)

    def chat(self, chat: Chat) -> list[int]:
        """Token ids of a conversation by the chat template."""
        for name in chat.variables:
            if not name.isidentifier() or name in RESERVED or name.startswith("_"):
                raise InvalidRequest(
                    f"variables_json: {name[:64]!r} is not possible; it must be the name of one of "
                    "the template's own variables",
                    field="variables_json",
                )
        if self._tokenizer.chat_template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; send prompt text or token ids",
                field="messages",
            )
        try:
            rendered = self._rendered(chat)
            ids: list[int] = self._tokenizer(rendered, add_special_tokens=False).input_ids
        except InvalidRequest:
            raise
        except Exception as error:  # a template may raise anything; it is the client's messages
            raise InvalidRequest(
                f"messages: the chat template refuses them: {error}", field="messages"
            ) from error
        return ids

    def _rendered(self, chat: Chat) -> str:
        if self._render is None:
            text: str = self._tokenizer.apply_chat_template(
                list(chat.messages),
                tools=chat.tools,
                add_generation_prompt=chat.add_generation_prompt,
                tokenize=False,
                **chat.variables,
            )
            return text
        template: str = self._tokenizer.get_chat_template(None, chat.tools)
        variables = {**self._tokenizer.special_tokens_map, **chat.variables}
        return self._render(template, chat, variables, MOST_CHARACTERS)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str:
        """The text of one token by itself, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)
