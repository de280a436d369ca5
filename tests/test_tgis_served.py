"""TGIS's service and our own give the same answers, from one real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from rig import load_base
from serving import Serving, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.clients import errors
from deltaserve.tgis import generation_pb2 as tgis
from deltaserve.tgis.generation_pb2_grpc import GenerationServiceStub

ZOO = Path(__file__).parents[1] / "demo" / "zoo"
TEXTS = ("task: fig =", "task: the quick brown fox =")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Serving, Any]]:
    with serving(load_base(ZOO / "base"), [ZOO], max_length=96) as found:
        found.client.load_adapter("sort", "sort-ia3")
        with grpc.insecure_channel(found.address) as channel:
            yield found, GenerationServiceStub(channel)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ZOO / "base")


def ask(stub: Any, *texts: str, adapter_id: str = "", **params: Any) -> Any:
    requests = [tgis.GenerationRequest(text=text) for text in texts]
    request = tgis.BatchedGenerationRequest(
        adapter_id=adapter_id, requests=requests, params=tgis.Parameters(**params)
    )
    return stub.Generate(request, timeout=60).responses


@pytest.mark.parametrize("model", ["", "base", "sort"])
def test_the_text_is_that_of_our_own_service(served: Any, tokenizer: Any, model: str) -> None:
    serving, stub = served
    model = serving.client.server_info().base if model == "base" else model
    shown = {
        "generated_tokens": True,
        "input_tokens": True,
        "token_logprobs": True,
        "token_ranks": True,
        "top_n_tokens": 2,
    }
    for text, answer in zip(
        TEXTS, ask(stub, *TEXTS, adapter_id=model, response=shown), strict=True
    ):
        ours = serving.client.generate(text, model, max_tokens=20, logprobs=2, prompt_logprobs=2)
        assert answer.text == ours.text
        assert answer.generated_token_count == len(ours.token_ids)
        names = tokenizer.convert_ids_to_tokens
        assert [t.text for t in answer.tokens] == names(ours.token_ids)
        assert [t.logprob for t in answer.tokens] == pytest.approx(ours.logprobs, abs=1e-4)
        assert [t.rank for t in answer.tokens] == [1] * len(ours.token_ids), "it is greedy"
        tops = [
            [name for name, _ in zip(names([i for i, _ in top]), top, strict=True)]
            for top in ours.top_logprobs
        ]
        assert [[t.text for t in token.top_tokens] for token in answer.tokens] == tops
        prompt = serving.client.tokenize(text)
        assert [t.text for t in answer.input_tokens] == names(prompt)
        assert answer.input_tokens[0].rank == 0
        for token in answer.input_tokens[1:]:
            inside = [t.logprob for t in token.top_tokens]
            assert (token.rank <= 2) == (token.logprob >= inside[1]), "rank by its own probability"


def test_why_it_ended(served: Any, tokenizer: Any) -> None:
    serving, stub = served
    text = TEXTS[1]
    whole = serving.client.generate(text, "sort", max_tokens=64)
    assert whole.finish_reason == "stop"
    (ended,) = ask(stub, text, adapter_id="sort", stopping={"max_new_tokens": 64})
    assert (ended.stop_reason, ended.text) == (tgis.EOS_TOKEN, whole.text)
    assert ended.stop_sequence == tokenizer.eos_token
    stop = whole.text[4:6]
    at = whole.text.index(stop)
    stopping = {"max_new_tokens": 64, "stop_sequences": [stop]}
    (stopped,) = ask(stub, text, adapter_id="sort", stopping=stopping)
    assert (stopped.stop_reason, stopped.stop_sequence) == (tgis.STOP_SEQUENCE, stop)
    assert stopped.text == whole.text[: at + len(stop)]
    stopping["include_stop_sequence"] = False
    (without,) = ask(stub, text, adapter_id="sort", stopping=stopping)
    assert without.text == whole.text[:at]
    (short,) = ask(stub, text, adapter_id="sort", stopping={"max_new_tokens": 3})
    assert (short.stop_reason, short.generated_token_count) == (tgis.MAX_TOKENS, 3)
    (full,) = ask(stub, text, stopping={"max_new_tokens": 5000, "min_new_tokens": 5000})
    length = stub.ModelInfo(tgis.ModelInfoRequest()).max_sequence_length
    assert full.stop_reason == tgis.TOKEN_LIMIT
    assert full.input_token_count + full.generated_token_count == length


@pytest.mark.parametrize(
    ("guided", "right"),
    [
        ({"choice": {"choices": ["yes", "no"]}}, {"yes", "no"}),
        ({"regex": "[x]{4}"}, {"xxxx"}),
        ({"grammar": 'start: "ok" "ok"'}, {"okok"}),
        ({"json_schema": '{"const": true}'}, {"true"}),
        ({"format": tgis.DecodingParameters.JSON}, None),
    ],
    ids=["choice", "regex", "grammar", "schema", "json"],
)
def test_guided(served: Any, guided: Any, right: set[str] | None) -> None:
    (answer,) = ask(served[1], TEXTS[0], decoding=guided)
    assert answer.text in right if right else answer.text.startswith("{")


def test_the_length_penalty_ends_an_answer_as_transformers_does(
    served: Any, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(ZOO / "base", dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(TEXTS[1]).input_ids])
    lengths: list[int] = []
    for given in (None, (2, 1.5)):
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            pad_token_id=0,
            exponential_decay_length_penalty=given,
        )[0, ids.shape[1] :]
        penalty = {"start_index": given[0], "decay_factor": given[1]} if given else None
        (answer,) = ask(
            served[1],
            TEXTS[1],
            decoding={"length_penalty": penalty},
            stopping={"max_new_tokens": 60},
            response={"generated_tokens": True},
        )
        assert [t.text for t in answer.tokens] == tokenizer.convert_ids_to_tokens(expected)
        lengths.append(len(expected))
    assert lengths[1] < lengths[0]


def test_a_route_is_asked_for_like_an_adapter(served: Any) -> None:
    serving, stub = served
    serving.client.put_route("sorting", [{"name": "only", "model": "sort"}])
    (answer,) = ask(stub, TEXTS[0], adapter_id="sorting")
    assert answer.text == serving.client.generate(TEXTS[0], "sort", max_tokens=20).text
    request = tgis.BatchedTokenizeRequest(
        adapter_id="sorting", requests=[tgis.TokenizeRequest(text=TEXTS[0])]
    )
    count = stub.Tokenize(request).responses[0].token_count
    assert count == len(serving.client.tokenize(TEXTS[0])) == answer.input_token_count
    batch = tgis.BatchedGenerationRequest(
        adapter_id="sorting", requests=[tgis.GenerationRequest(text=text) for text in TEXTS]
    )
    named = [("x-correlation-id", "rated")]
    stub.Generate(batch, metadata=named, timeout=60)
    single = tgis.SingleGenerationRequest(adapter_id="sorting", request=batch.requests[0])
    assert list(stub.GenerateStream(single, metadata=named, timeout=60))
    for answer_id in ("rated-0", "rated-1", "rated"):
        assert serving.client.record_feedback(answer_id, reward=1.0).arm == "only"
    with pytest.raises(errors.NotFound):
        serving.client.record_feedback("rated-2", reward=1.0)


def test_offsets_are_those_of_the_tokenizer(served: Any, tokenizer: Any) -> None:
    request = tgis.BatchedTokenizeRequest(
        requests=[tgis.TokenizeRequest(text="naïve  fig")], return_tokens=True, return_offsets=True
    )
    found = served[1].Tokenize(request).responses[0]
    expected = tokenizer("naïve  fig", return_offsets_mapping=True)
    assert list(found.tokens) == tokenizer.convert_ids_to_tokens(expected.input_ids)
    assert [(o.start, o.end) for o in found.offsets] == expected.offset_mapping


def test_truncation_is_that_of_transformers(served: Any, tokenizer: Any) -> None:
    serving, stub = served
    ids = tokenizer(TEXTS[1]).input_ids
    for most in (3, len(ids) - 1, len(ids), 1000):
        request = tgis.BatchedTokenizeRequest(
            requests=[tgis.TokenizeRequest(text=TEXTS[1])],
            return_tokens=True,
            truncate_input_tokens=most,
        )
        found = stub.Tokenize(request).responses[0]
        tokenizer.truncation_side = "left"
        expected = tokenizer(TEXTS[1], truncation=True, max_length=most).input_ids
        assert list(found.tokens) == tokenizer.convert_ids_to_tokens(expected)
        (answer,) = ask(stub, TEXTS[1], truncate_input_tokens=most)
        assert answer.text == serving.client.generate(expected, max_tokens=20).text
