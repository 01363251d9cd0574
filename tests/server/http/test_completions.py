"""Texts that go on: forms of prompts, outputs, log-probabilities, events."""

from __future__ import annotations

import math
from typing import Any

import pytest

from concertina.client import Client
from tests.server.http.gateways import Front

PATH = "/v1/completions"
MODEL = "tiny-text"


def _text(front: Front, **body: Any) -> str:
    reply = front.post(PATH, {"model": MODEL, "max_tokens": 8, "seed": 3, **body})
    assert reply.status == 200, reply.raw
    text: str = reply.json["choices"][0]["text"]
    return text


def test_the_text_is_that_of_the_grpc_service(front: Front) -> None:
    with Client(front.upstream, key="") as client:
        whole = client.complete("def ", model=MODEL, max_tokens=40, seed=5)
    body = {"model": MODEL, "prompt": "def ", "max_tokens": 40, "seed": 5}
    reply = front.post(PATH, body)
    assert reply.json["choices"][0]["text"] == whole.text
    assert reply.json["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 40,
        "total_tokens": 44,
    }
    streamed = front.post(PATH, {**body, "stream": True})
    assert streamed.is_whole
    assert streamed.text == whole.text
    assert streamed.events[-1] == "[DONE]"
    lines = [line for line in streamed.raw.split(b"\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert streamed.events[0]["id"] == f"cmpl-{streamed.headers['x-concertina-stream']}"


def test_the_four_forms_of_a_prompt_are_one(front: Front) -> None:
    ids = [*b"def "]
    one = _text(front, prompt="def ")
    assert _text(front, prompt=ids) == one
    other = _text(front, prompt="x = ")
    for prompts in (["def ", "x = "], [ids, [*b"x = "]]):
        reply = front.post(PATH, {"model": MODEL, "prompt": prompts, "max_tokens": 8, "seed": 3})
        assert [(each["index"], each["text"]) for each in reply.json["choices"]] == [
            (0, one),
            (1, other),
        ]
    assert one != other


def test_an_empty_prompt_starts_from_nothing(front: Front) -> None:
    assert _text(front) == _text(front, prompt="") == _text(front, prompt=[256])


def test_many_prompts_with_several_outputs_each(front: Front) -> None:
    body = {"model": MODEL, "prompt": ["a", "b", "c"], "n": 2, "seed": 1, "max_tokens": 3}
    reply = front.post(PATH, body)
    assert [each["index"] for each in reply.json["choices"]] == [0, 1, 2, 3, 4, 5]
    streamed = front.post(PATH, body | {"stream": True})
    texts: dict[int, str] = {}
    ended = set()
    for event in streamed.events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ended |= {choice["index"]} if choice["finish_reason"] else set()
    assert ended == {0, 1, 2, 3, 4, 5}
    assert texts == {each["index"]: each["text"] for each in reply.json["choices"]}


def test_echo_sends_the_prompt_first(front: Front) -> None:
    plain = _text(front, prompt="def ")
    assert _text(front, prompt="def ", echo=True) == "def " + plain
    assert _text(front, prompt=[*b"def "], echo=True) == "def " + plain
    body = {"model": MODEL, "prompt": "def ", "max_tokens": 8, "seed": 3, "echo": True}
    assert front.post(PATH, body | {"stream": True}).text == "def " + plain


def test_scores_of_a_prompt_are_those_of_the_score_service(front: Front) -> None:
    """Up to a full context, of which there is no room to generate."""
    text = ("the quick brown fox jumps over it " * 3)[:96]
    with Client(front.upstream, key="") as client:
        bits = client.score(text, model=MODEL).bits
    body = {"model": MODEL, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = front.post(PATH, body).json["choices"]
    assert choice["text"] == text
    told = choice["logprobs"]
    found = told["token_logprobs"]
    assert found == pytest.approx([-each * math.log(2) for each in bits], abs=1e-4)
    assert told["tokens"] == [*text]
    assert told["text_offset"] == [*range(96)]
    for token, logprob, top in zip(text, found, told["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert 1 <= len(top) <= 2


def test_what_lm_eval_asks_for(front: Front) -> None:
    """One entry for each token of the prompt and one more; the start token is null."""
    body = {"model": MODEL, "prompt": [[256, *b"abc"], [*b"xy"]], "temperature": 0}
    body |= {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    first, second = (each["logprobs"] for each in front.post(PATH, body).json["choices"])
    assert len(first["token_logprobs"]) == 5
    assert first["token_logprobs"][0] is None
    assert first["top_logprobs"][0] is None
    assert all(each < 0 for each in first["token_logprobs"][1:])
    assert len(second["token_logprobs"]) == 3
    (choice,) = front.post(PATH, body | {"prompt": "abc"}).json["choices"]
    assert choice["logprobs"]["token_logprobs"] == first["token_logprobs"][1:]


def test_bytes_that_are_no_character_have_names(front: Front) -> None:
    body = {"model": MODEL, "prompt": "é", "max_tokens": 0, "echo": True, "logprobs": 20}
    (choice,) = front.post(PATH, body).json["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert all(20 <= len(each) <= 21 for each in choice["logprobs"]["top_logprobs"])


def test_logprobs_in_events_are_those_of_the_whole(front: Front) -> None:
    body = {"model": MODEL, "prompt": "é", "max_tokens": 30, "seed": 2, "logprobs": 3, "echo": True}
    whole = front.post(PATH, body).json["choices"][0]["logprobs"]
    streamed: dict[str, list[Any]] = {name: [] for name in whole}
    for event in front.post(PATH, body | {"stream": True}).events[:-1]:
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == whole


def test_parameters_reach_the_server(front: Front) -> None:
    assert _text(front, prompt="a", allowed_token_ids=[120], max_tokens=5) == "xxxxx"
    assert _text(front, prompt="a", logit_bias={"121": 100}, temperature=0) == "y" * 8
    stop = {"allowed_token_ids": [120], "stop": "xxx", "max_tokens": 20}
    assert _text(front, prompt="a", **stop) == ""
    assert _text(front, prompt="a", **stop, include_stop_str_in_output=True) == "xxx"
    reply = front.post(PATH, {"model": MODEL, "prompt": "a", **stop})
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert reply.json["choices"][0]["stop_reason"] == "xxx"
    assert len(_text(front, prompt="a", max_tokens=None, allowed_token_ids=[120])) == 16
    assert _text(front, prompt="a", seed=-1) == _text(front, prompt="a", seed=2**64 - 1)


def test_the_usage_is_the_last_event(front: Front) -> None:
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 5, "stream": True}
    options = {"stream_options": {"include_usage": True}}
    *parts, last, done = front.post(PATH, body | options).events
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert {each["usage"] for each in parts} == {None}
    assert done == "[DONE]"
    assert not any("usage" in each for each in front.post(PATH, body).events[:-1])
