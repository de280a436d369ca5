"""Text: the base model's tokenizer, as the server uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from deltaserve.server.errors import InvalidRequest


class Text:
    """Encoding, chat templates, decoding. Safe to call from any thread."""

    def __init__(self, path: str | Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.backend: Tokenizer | None = getattr(self._tokenizer, "backend_tokenizer", None)
        self.vocab_size = len(self._tokenizer)
        self.eos_token_id: int | None = self._tokenizer.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation ({"role", "content"} each) by the model's chat template."""
        if self._tokenizer.chat_template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; send prompt text or token ids",
                field="messages",
            )
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # a template may raise anything; it is the client's messages
            raise InvalidRequest(f"messages: the chat template refuses them: {error}") from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str:
        """The text of one token by itself, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)
