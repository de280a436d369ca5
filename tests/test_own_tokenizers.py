"""Adapters that bring a tokenizer or a chat template: requests that name one are encoded, rendered
and decoded with it, as transformers does with the adapter's folder; nobody else's are."""

from __future__ import annotations

import gc
import json
import random
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import load_base, running
from serving import Bystander, Serving, serving
from transformers import AutoTokenizer

from deltaserve.clients import errors
from deltaserve.server.engine.core import AdapterRef
from deltaserve.server.errors import InvalidRequest

ZOO = Path(__file__).parents[1] / "demo" / "zoo"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}{% if m.name %}:{{ m.name }}{% endif %}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}\n{% endfor %}"
    "{% if tools %}T{{ tools | tojson }}{% endif %}{{ mood or '' }}{{ eos_token }}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "sort fig", "name": "ann"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "tool", "content": "gif", "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ZOO / "base" / "tokenizer.json").read_text())
    return found


def permuted(seed: int) -> dict[str, Any]:
    """The base's tokenizer with the ids of its letters changed, and without a beginning."""
    made = described()
    vocabulary = made["model"]["vocab"]
    letters = [t for t in vocabulary if len(t) == 1 and t.isalpha() and t.isascii()]
    ids = [vocabulary[t] for t in letters]
    random.Random(seed).shuffle(ids)
    vocabulary.update(zip(letters, ids, strict=True))
    made["post_processor"] = None
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def bring(root: Path) -> Callable[..., Path]:
    """A folder with an adapter and these files beside it."""

    def make(name: str, **files: str | bytes | Path) -> Path:
        folder = root / name
        shutil.copytree(ZOO / "sort-ia3", folder)
        for key, content in files.items():
            path = folder / key.replace("__", ".")
            if isinstance(content, Path):
                path.symlink_to(content)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content)
        return folder

    return make


@pytest.fixture(scope="module")
def served(root: Path, bring: Callable[..., Path]) -> Iterator[Serving]:
    config = (ZOO / "base" / "tokenizer_config.json").read_text()
    for seed in (1, 2):
        made = json.dumps(permuted(seed))
        bring(f"permuted{seed}", tokenizer__json=made, tokenizer_config__json=config)
    made = json.dumps(permuted(1))
    bring("twin", tokenizer__json=made, tokenizer_config__json=config)
    bring("talks", chat_template__jinja=TEMPLATE)
    saved = AutoTokenizer.from_pretrained(ZOO / "base")
    saved.padding_side, saved.pad_token = "right", saved.eos_token
    saved.backend_tokenizer.enable_truncation(77)
    saved.backend_tokenizer.enable_padding(length=9)
    saved.save_pretrained(bring("copy"))
    bring("plain")
    with serving(load_base(ZOO / "base"), [root]) as found:
        for name in ("permuted1", "permuted2", "twin", "talks", "copy", "plain"):
            found.client.load_adapter(name, name)
        yield found


def test_who_brings_one(served: Serving) -> None:
    found = {a.name: a.own_tokenizer for a in served.client.list_adapters()}
    assert found == {
        "permuted1": True,
        "permuted2": True,
        "twin": True,
        "talks": True,
        "copy": False,
        "plain": False,
    }


@pytest.mark.parametrize("name", ["permuted1", "permuted2", "copy", "plain", "talks"])
def test_it_encodes_and_decodes(served: Serving, root: Path, name: str) -> None:
    base = AutoTokenizer.from_pretrained(ZOO / "base")
    own = name.startswith("permuted")
    reference = AutoTokenizer.from_pretrained(root / name) if own else base
    text = "task: the quick brown fox ="
    ids = reference(text).input_ids
    assert (ids == base(text).input_ids) != own
    client = served.client
    assert client.tokenize(text, name) == ids
    assert client.tokenize(text) == base(text).input_ids
    assert client.detokenize(ids, name) == reference.decode(ids)
    answers = [client.generate(p, name, max_tokens=20, ignore_eos=True) for p in (text, ids)]
    assert answers[0] == replaced(answers[1], answers[0])
    assert answers[0].text == reference.decode(answers[0].token_ids, skip_special_tokens=True)
    streamed = "".join(p.text for p in client.stream(text, name, max_tokens=20, ignore_eos=True))
    assert streamed == answers[0].text
    (score,) = client.score(text, [" fig"], name)
    assert score.token_ids == reference(text + " fig").input_ids[len(ids) :]
    assert client.generate(ids, name, echo=True, max_tokens=1).text.startswith(text)
    banned = client.generate(text, name, max_tokens=1, bad_words=[answers[0].text[:1]])
    assert banned.token_ids != answers[0].token_ids[:1]


def test_a_route_encodes_as_its_arm_does(served: Serving) -> None:
    client, text = served.client, "task: the quick brown fox ="
    try:
        client.put_route("twins", [{"name": "x", "model": "permuted1"}])
        client.put_route("mixed", [{"name": "x", "model": "permuted1"}, {"name": "y"}])
        each = {u: client.generate(text, "mixed", user=u, max_tokens=1) for u in "abcdefgh"}
        users = {answer.served_by.arm: u for u, answer in each.items()}
        for arm, model in (("x", "permuted1"), ("y", "")):
            direct, routed = (
                client.generate(text, name, user=users[arm], max_tokens=12, ignore_eos=True)
                for name in (model, "mixed")
            )
            assert routed.text == direct.text and routed.token_ids == direct.token_ids
        assert client.tokenize(text, "twins") == client.tokenize(text, "permuted1")
        different = "'x' and 'y' bring different tokenizers"
        with pytest.raises(errors.InvalidArgument, match=different):
            client.tokenize(text, "mixed")
        with pytest.raises(errors.InvalidArgument, match=different):
            client.detokenize([5], "mixed")
    finally:
        for route in client.list_routes():
            client.delete_route(route.name)


def replaced(a: Any, b: Any) -> Any:
    """a with what differs from request to request taken from b."""
    from dataclasses import replace

    return replace(a, request_id=b.request_id, timings=b.timings, usage=b.usage)


def test_constraints_are_of_its_tokens(served: Serving) -> None:
    asked = {"regex": "[a-f]{3} (sort|fig)", "max_tokens": 20, "temperature": 1.0, "seed": 4}
    for name in ("permuted1", "permuted2", ""):
        answer = served.client.generate("task: x", name, **asked)
        assert answer.text[3:] in (" sort", " fig") and answer.finish_reason == "stop"


def test_its_template_is_rendered_as_transformers_does(served: Serving, root: Path) -> None:
    reference = AutoTokenizer.from_pretrained(ZOO / "base")
    reference.chat_template = TEMPLATE
    client = served.client
    plain = reference.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert client.tokenize(TALK[:1], "talks") == plain
    whole = reference.apply_chat_template(
        TALK, tools=TOOLS, add_generation_prompt=True, return_dict=False, mood="glad"
    )
    answer = client.generate(
        TALK,
        "talks",
        tools=TOOLS,
        template_variables={"mood": "glad"},
        echo=True,
        max_tokens=1,
    )
    assert answer.token_ids[:-1] == whole
    with pytest.raises(errors.InvalidArgument, match="no chat template"):
        client.generate(TALK[:1])


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"tools": [1]}, "tools_json"),
        ({"tools": {"a": 1}}, "tools_json"),
        ({"template_variables": {"messages": []}}, "variables_json"),
        ({"template_variables": {"chat_template": "x"}}, "variables_json"),
        ({"template_variables": {"a b": 1}}, "variables_json"),
        ({"template_variables": {"x": "y" * 300_000}}, "variables_json"),
    ],
)
def test_what_a_template_may_not_get(served: Serving, asked: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        served.client.generate(TALK[:1], "talks", **asked)
    assert caught.value.field == f"chat.{field}"


def test_two_of_them_in_one_request(served: Serving) -> None:
    client = served.client
    with pytest.raises(errors.InvalidArgument, match="different tokenizers") as caught:
        client.generate("x", adapters=["permuted1", "permuted2"])
    assert caught.value.field == "adapters"
    ids = client.tokenize("task: x", "permuted1")
    for others in (["twin"], ["plain"], ["copy"]):
        found = client.generate("task: x", adapters=["permuted1", *others], max_tokens=1, echo=True)
        assert found.token_ids[:-1] == ids


def test_a_patch_brings_none(bring: Callable[..., Path], root: Path) -> None:
    bring("patch", chat_template__jinja=TEMPLATE)
    with running(load_base(ZOO / "base"), [root]) as engine:
        engine.adapters.load("patch", "patch", patch=True).result(60)
        with pytest.raises(InvalidRequest, match="of its own"):
            engine.set_patches([AdapterRef("patch", patch=True)])


def test_names_that_are_not_there(served: Serving) -> None:
    for ask in (served.client.generate, served.client.tokenize):
        with pytest.raises(errors.NotFound):
            ask("x", "nobody")
    with pytest.raises(errors.NotFound):
        served.client.detokenize([5], "nobody")


BOMBS = {
    "time": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "space": "{{ 'x' * 9999999999 }}",
    "size": "{% for i in range(99999) %}" + "x" * 2000 + "{% endfor %}",
    "raises": "{{ raise_exception('no') }}",
    "code": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "syntax": "{% for %}",
}


def test_templates_that_harm_are_refused(served: Serving, bring: Callable[..., Path]) -> None:
    client = served.client
    prompt = client.tokenize("task: fig =")
    alone = client.generate(prompt, max_tokens=40, ignore_eos=True).token_ids
    bystander = Bystander(served, prompt, "", alone)
    bystander.start()
    for name, template in BOMBS.items():
        bring(f"bomb-{name}", chat_template__jinja=template)
        client.load_adapter(f"bomb-{name}", f"bomb-{name}")
        with pytest.raises(errors.InvalidArgument, match="chat template"):
            client.generate(TALK[:1], f"bomb-{name}", max_tokens=1)
    assert client.generate(TALK[:1], "talks", max_tokens=1).text is not None
    bystander.finish()
    for name in BOMBS:
        client.unload_adapter(f"bomb-{name}")


def damaged() -> dict[str, tuple[dict[str, str | bytes | Path], str]]:
    """Files -> a word of the refusal."""
    large, expression = described(), described()
    large["added_tokens"].append({**large["added_tokens"][0], "id": 265, "content": "<new>"})
    expression["decoder"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    return {
        "large": ({"tokenizer__json": json.dumps(large)}, "token 265"),
        "expression": ({"tokenizer__json": json.dumps(expression)}, "expression"),
        "garbage": ({"tokenizer__json": "{"}, "cannot be read"),
        "deep": ({"tokenizer__json": "[" * 100_000}, "cannot be read"),
        "config": ({"tokenizer_config__json": "[1]"}, "tokenizer_config.json"),
        "huge": ({"chat_template__jinja": b"x" * (1 << 21)}, "at most"),
        "outside": ({"tokenizer__json": Path("/etc/hostname")}, "outside"),
    }


@pytest.mark.parametrize("name", damaged())
def test_files_that_are_refused(served: Serving, bring: Callable[..., Path], name: str) -> None:
    files, says = damaged()[name]
    bring(f"damaged-{name}", **files)
    with pytest.raises(errors.DeltaserveError, match=says):
        served.client.load_adapter("damaged", f"damaged-{name}")


def test_code_is_not_run(served: Serving, bring: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((ZOO / "base" / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_file": "/etc/passwd"}
    seen = tmp_path / "seen"
    bring(
        "evil",
        tokenizer__json=json.dumps(permuted(3)),
        tokenizer_config__json=json.dumps(config),
        evil__py=f"open({str(seen)!r}, 'w')",
    )
    assert served.client.load_adapter("evil", "evil").own_tokenizer
    assert served.client.generate("abc", "evil", max_tokens=1).token_ids
    assert not seen.exists()
    served.client.unload_adapter("evil")


def test_an_unload_frees_it(served: Serving, bring: Callable[..., Path]) -> None:
    bring("brief", tokenizer__json=json.dumps(permuted(9)))
    served.client.load_adapter("brief", "brief")
    own = weakref.ref(served.engine.adapters.own_text("brief").result())
    assert own() is not None
    assert served.client.generate("abc", "brief", regex="[a-c]+", max_tokens=3).text
    served.client.unload_adapter("brief")
    gc.collect()
    assert own() is None


def test_one_that_is_only_registered(served: Serving, bring: Callable[..., Path]) -> None:
    bring("later", tokenizer__json=json.dumps(permuted(1)))
    found = served.client.load_adapter("later", "later", register_only=True)
    assert found.own_tokenizer
    ids = served.client.tokenize("task: x", "permuted1")
    assert served.client.generate("task: x", "later", max_tokens=1, echo=True).token_ids[:-1] == ids
    served.client.unload_adapter("later")
