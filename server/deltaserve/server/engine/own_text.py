"""Tokenizers and chat templates that adapters bring.

PEFT saves the tokenizer that it trained with beside the adapter, mostly a copy of the base's: that
is found out, and nothing is kept of it. Of the others only data is read: no code, no pickle, no
file but those named here. Templates are rendered by a process that may be killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.server.confined.helper import Helper, JobEnded
from deltaserve.server.engine.chat import Chat
from deltaserve.server.engine.text import Text
from deltaserve.server.errors import InvalidRequest

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = {
    TOKENIZER: 64 << 20,
    CONFIG: 4 << 20,
    TEMPLATE: 1 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 4 << 20,
}
"""What is read, and the most bytes of it."""
LEADING = frozenset((TOKENIZER, CONFIG, TEMPLATE))
"""Without one of these the others say nothing."""
RENDER_SECONDS = 2.0
"""Of the processor, for one conversation."""


class OwnTexts:
    """Reads them, for one base. Its methods take long: not for the engine's thread or a loop.

    folder: of an adapter's uri. vocabulary: of the model; no adapter has another.
    """

    def __init__(self, base: Text, folder: Callable[[str], Path], vocabulary: int) -> None:
        self._base = base
        self._folder = folder
        self._vocabulary = vocabulary
        self._helper = Helper(lambda: {"work": "templates"}, processes=1)
        self._known: WeakValueDictionary[str, Text] = WeakValueDictionary()
        self._nothing: set[str] = set()
        self._lock = threading.Lock()

    def read(self, uri: str) -> Text | None:
        """What the adapter there brings; None if that is the base's, or nothing. Those of equal
        files are one object. Raises InvalidAdapter."""
        folder = self._folder(uri)
        if not folder.is_dir():
            return None
        found = _files(folder)
        ours = {name: data for name, data in found.items() if data != self._of_base(name)}
        if not LEADING & ours.keys():
            return None
        digest = _digest(found)
        with self._lock:
            if digest in self._nothing:
                return None
            if (known := self._known.get(digest)) is not None:
                return known
        made = self._make(uri, found)
        with self._lock:
            if made is None:
                self._nothing.add(digest)
                return None
            return self._known.setdefault(digest, made)

    def close(self) -> None:
        """End the process that renders."""
        self._helper.close()

    def _of_base(self, name: str) -> bytes | None:
        path = self._base.folder / name
        return path.read_bytes() if path.is_file() else None

    def _make(self, uri: str, found: dict[str, bytes]) -> Text | None:
        """What the base's files with these in their place are; None if no different."""
        given = {**self._missing(found), **found}
        if CONFIG in given:
            given[CONFIG] = _harmless(uri, given[CONFIG])
        with tempfile.TemporaryDirectory(prefix="deltaserve-tokenizer-") as at:
            for name, data in given.items():
                Path(at, name).write_bytes(data)
            try:
                own = Text(at, render=self._render)
            except BaseException as error:  # the tokenizer's own panics are no Exceptions
                if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                    raise
                raise InvalidAdapter(
                    f"{uri}: its tokenizer cannot be read: {str(error)[:300]}", field=TOKENIZER
                ) from error
        if own.has_chat_template is False:
            own.take_template(self._base)
        self._check(uri, own)
        return None if own.description == self._base.description else own

    def _missing(self, found: Mapping[str, bytes]) -> dict[str, bytes]:
        """Of the base's files, those that are needed beside the adapter's."""
        wanted = {"config.json", TOKENIZER, CONFIG} - found.keys()
        if not {TOKENIZER, CONFIG} & found.keys():
            wanted |= {"special_tokens_map.json", "added_tokens.json"} - found.keys()
        return {name: data for name in wanted if (data := self._of_base(name)) is not None}

    def _check(self, uri: str, own: Text) -> None:
        if own.backend is None:
            raise InvalidAdapter(f"{uri}: its tokenizer has no {TOKENIZER}", field=TOKENIZER)
        largest = max(own.backend.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= self._vocabulary:
            raise InvalidAdapter(
                f"{uri}: its tokenizer has token {largest}; the model has {self._vocabulary}",
                field=TOKENIZER,
            )
        if '"Regex"' in json.dumps(json.loads(own.backend.to_str()).get("decoder")):
            raise InvalidAdapter(
                f"{uri}: the decoder of its tokenizer has an expression, which is not run",
                field=TOKENIZER,
            )

    def _render(self, template: str, chat: Chat, variables: Mapping[str, Any], most: int) -> str:
        """The text that the template makes."""
        job = {
            "template": template,
            "messages": list(chat.messages),
            "tools": chat.tools,
            "add_generation_prompt": chat.add_generation_prompt,
            "variables": dict(variables),
            "most": most,
        }
        try:
            answer = self._helper.ask(job, RENDER_SECONDS)
        except JobEnded as error:
            text = f"messages: the adapter's chat template cannot be rendered: {error}"
            raise InvalidRequest(text, field="messages") from error
        if answer["error"]:
            raise InvalidRequest(
                f"messages: the chat template refuses them: {answer['error']}", field="messages"
            )
        rendered: str = answer["text"]
        return rendered


def _files(folder: Path) -> dict[str, bytes]:
    found = {}
    for name, most in FILES.items():
        path = folder / name
        if not path.is_file():
            continue
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1)
        if len(data) > most:
            raise InvalidAdapter(f"{path}: {size} bytes; at most {most} are read", field=name)
        found[name] = data
    return found


def _harmless(uri: str, config: bytes) -> bytes:
    """A tokenizer_config.json without what names code or files."""
    try:
        given = json.loads(config)
        if not isinstance(given, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{uri}: {CONFIG} cannot be read: {error}", field=CONFIG) from error
    kept = {
        name: value
        for name, value in given.items()
        if name not in ("auto_map", "name_or_path", "vocab_file") and not name.endswith("_file")
    }
    return json.dumps(kept).encode()


def _digest(files: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, data in sorted(files.items()):
        whole.update(f"{name}\0{len(data)}\0".encode())
        whole.update(data)
    return whole.hexdigest()
