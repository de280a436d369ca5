"""A real engine over HTTP: the same tokens as over gRPC, and through LangChain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from rig import load_base
from serving import Serving, serving

ZOO = Path(__file__).parents[1] / "demo" / "zoo"
TEXT = "task: the quick brown fox ="
ADAPTERS = {"sort": "sort-ia3", "upper": "upper-prefix", "caesar": "caesar-lora"}
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% for t in tools or [] %}"
    "{{ t.function.name }}{% endfor %}"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    base = tmp_path_factory.mktemp("http") / "base"
    shutil.copytree(ZOO / "base", base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    with serving(load_base(base), [ZOO], http=True) as found:
        for name, folder in ADAPTERS.items():
            found.client.load_adapter(name, folder)
        yield found


@pytest.fixture(scope="module")
def client(served: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("model", ["", *ADAPTERS])
def test_greedy_text_is_that_of_grpc(served: Serving, client: openai.OpenAI, model: str) -> None:
    expected = served.client.generate(TEXT, model, max_tokens=12, logprobs=2)
    given: dict[str, Any] = {"model": model, "max_tokens": 12, "temperature": 0, "seed": 1}
    answer = client.completions.create(prompt=TEXT, logprobs=2, **given)
    [choice] = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == expected.choices[0].finish_reason
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    shown = "".join(choice.logprobs.tokens).removesuffix("</s>")
    assert shown == expected.text
    pieces = client.chat.completions.create(
        messages=[{"role": "user", "content": TEXT}], stream=True, **given
    )
    streamed = "".join(p.choices[0].delta.content or "" for p in pieces)
    talk = served.client.generate([{"role": "user", "content": TEXT}], model, max_tokens=12)
    assert streamed == talk.text
    told = answer.model_extra["served_by"]["adapters"]
    assert [a["name"] for a in told] == ([model] if model else [])


def test_a_composition_is_that_of_grpc(served: Serving, client: openai.OpenAI) -> None:
    parts = {"sort": 0.7, "caesar": 0.4}
    expected = served.client.generate(TEXT, adapters=parts, max_tokens=12, logprobs=0)
    for adapters in (parts, [{"name": n, "strength": s} for n, s in parts.items()]):
        answer = client.completions.create(
            model=served.client.server_info().base,
            prompt=TEXT,
            max_tokens=12,
            temperature=0,
            logprobs=0,
            extra_body={"adapters": adapters},
        )
        assert answer.choices[0].text == expected.text
        found = answer.choices[0].logprobs
        assert found is not None
        assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        told = answer.model_extra["served_by"]["adapters"]
        assert {a["name"]: a["strength"] for a in told} == parts


def test_scores_as_lm_eval_asks_for_them(served: Serving, client: openai.OpenAI) -> None:
    """echo, one log-probability, one token: what evaluations read is the prompt's."""
    ids = served.client.tokenize(TEXT)
    told = served.client.generate(ids, "sort", max_tokens=1, prompt_logprobs=1)
    [choice] = client.completions.create(
        model="sort", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
    ).choices
    found = choice.logprobs
    assert found is not None and found.token_logprobs is not None and told.prompt_logprobs
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(told.prompt_logprobs[1:], abs=1e-4)


def test_a_stop_is_told_as_it_was_given(client: openai.OpenAI) -> None:
    def end(**given: Any) -> Any:
        answer = client.completions.create(
            model="caesar", prompt="task: abc =", temperature=0, max_tokens=8, **given
        )
        choice = answer.choices[0]
        return choice.text, choice.finish_reason, choice.model_extra["stop_reason"]

    text, reason, why = end()
    assert len(text) > 1 and (reason, why) == ("stop", None), "the end of sequence"
    assert end(stop=text[1]) == (text[0], "stop", text[1])
    token = client.post("/../tokenize", body={"prompt": text}, cast_to=object)["tokens"][-1]
    assert end(extra_body={"stop_token_ids": [token]})[1:] == ("stop", token)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def test_langchain(served: Serving) -> None:
    given: dict[str, Any] = {"base_url": f"{served.http}/v1", "api_key": "none", "max_retries": 0}
    plain = OpenAI(model="sort", temperature=0, max_tokens=12, **given)
    expected = served.client.generate(TEXT, "sort", max_tokens=12).text
    assert plain.invoke(TEXT) == expected
    assert "".join(plain.stream(TEXT)) == expected
    chat = ChatOpenAI(model="sort", temperature=0, max_tokens=48, stream_usage=True, **given)
    whole = chat.invoke(TEXT)
    pieces = list(chat.stream(TEXT))
    assert whole.content == "".join(str(p.content) for p in pieces) != ""
    assert whole.usage_metadata and whole.usage_metadata["input_tokens"] > 5
    assert sum(p.usage_metadata["output_tokens"] for p in pieces if p.usage_metadata) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_must_be_called_are(client: openai.OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/digit"}},
        "required": ["n"],
        "additionalProperties": False,
        "$defs": {"digit": {"enum": [1, 2]}},
    }
    function = {"name": "count", "parameters": schema}

    def call(choice: Any) -> tuple[Any, ...]:
        answer: Any = client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": TEXT}],
            tools=[{"type": "function", "function": function}],  # type: ignore[list-item]
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=300,
            stream=stream,
        )
        if stream:
            chunks = [c.choices[0] for c in answer]
            [calls] = [c.delta.tool_calls for c in chunks if c.delta.tool_calls]
            assert not any(c.delta.content for c in chunks)
            end = chunks[-1].finish_reason
        else:
            calls, end = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        [made] = calls
        assert made.id.startswith("call_") and made.function.name == "count"
        return json.loads(made.function.arguments)["n"], end

    n, end = call({"type": "function", "function": {"name": "count"}})
    assert n in (1, 2) and end == "stop"
    n, end = call("required")
    assert n in (1, 2) and end == "tool_calls"


def test_a_route_gives_users_the_arms_that_they_have_over_grpc(
    served: Serving, client: openai.OpenAI
) -> None:
    arms = [{"name": "a", "model": "sort"}, {"name": "b", "model": "caesar"}]
    served.client.put_route("split", arms=arms)
    texts = {m: served.client.generate(TEXT, m, max_tokens=12).text for m in ("sort", "caesar")}
    arms_of = {}
    for user in map(str, range(12)):
        expected = served.client.generate(TEXT, "split", user=user, max_tokens=1).served_by
        answer = client.completions.create(
            model="split", prompt=[TEXT, TEXT], user=user, temperature=0, max_tokens=12
        )
        told = answer.model_extra["served_by"]
        assert (told["route"], told["arm"]) == ("split", expected.arm)
        assert told["assignment"] == "ASSIGNMENT_STICKY"
        name = told["adapters"][0]["name"]
        assert [c.text for c in answer.choices] == [texts[name]] * 2
        each = [c.model_extra for c in answer.choices]
        assert [c["request_id"] for c in each] == [f"{answer.id}-0", f"{answer.id}-1"]
        assert all(c["served_by"] == told for c in each)
        arms_of[user] = told["arm"]
    assert set(arms_of.values()) == {"a", "b"}
    found = {m.id: m.model_extra["kind"] for m in client.models.list()}
    assert found["split"] == "route" and found["sort"] == "adapter"
