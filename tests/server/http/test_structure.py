"""Outputs that have to be something, and what asks for it in a way that is not understood."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.concertina.conftest import Fake
from tests.server.http.gateways import Front

TEXT = {"model": "tiny-text", "prompt": "a", "max_tokens": 60, "seed": 1}
CHAT = {"model": "tiny-text", "messages": [{"role": "user", "content": "a"}], "max_tokens": 60}
SCHEMA = {"enum": ["one", "two", "three"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
VALUES = ["one", "two", "three"]
JSON: list[dict[str, Any]] = [
    {"response_format": FORMAT},
    {"response_format": FORMAT | {"json_schema": {"schema": SCHEMA, "strict": False}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "json_object": False}},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA), "response_format": {"type": "text"}},
]


def _text(front: Front, **body: Any) -> str:
    reply = front.post("/v1/completions", TEXT | body)
    assert reply.status == 200, reply.raw
    (choice,) = reply.json["choices"]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"]
    return text


@pytest.mark.parametrize("asked", JSON, ids=str)
def test_json_for_a_schema(front: Front, asked: dict[str, Any]) -> None:
    assert json.loads(_text(front, **asked)) in VALUES
    streamed = front.post("/v1/completions", TEXT | asked | {"stream": True})
    assert json.loads(streamed.text) in VALUES
    chat = front.post("/v1/chat/completions", CHAT | asked | {"n": 3})
    said = [each["message"]["content"] for each in chat.json["choices"]]
    assert len(said) == 3
    assert all(json.loads(each) in VALUES for each in said)


@pytest.mark.parametrize("beginning", ["guided_", ""])
def test_each_kind(front: Front, beginning: str) -> None:
    def asked(kind: str, value: Any) -> dict[str, Any]:
        return {f"guided_{kind}": value} if beginning else {"structured_outputs": {kind: value}}

    assert _text(front, **asked("choice", ["yes", "no"])) in ("yes", "no")
    assert _text(front, **asked("regex", "[ab]{5}x")).strip("ab") == "x"
    assert _text(front, **asked("grammar", 'start: "q" x\nx: /[01]/ "!"')) in ("q0!", "q1!")
    # Of a long object, this has the beginning only.
    reply = front.post("/v1/completions", TEXT | asked("json_object", True))
    assert reply.json["choices"][0]["text"].lstrip().startswith("{")


def test_any_json_object(front: Front) -> None:
    reply = front.post("/v1/completions", TEXT | {"response_format": {"type": "json_object"}})
    assert reply.json["choices"][0]["text"].lstrip().startswith("{")


@pytest.mark.parametrize(
    ("param", "value", "place"),
    [
        ("response_format", "text", ""),
        ("response_format", {}, ".type"),
        ("response_format", {"type": "xml"}, ".type"),
        ("response_format", {"type": "structural_tag", "structures": []}, ".type"),
        ("response_format", {"type": "json_schema"}, ".json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {}}, ".json_schema.schema"),
        ("response_format", FORMAT | {"schema": SCHEMA}, ".schema"),
        ("response_format", {"type": "json_object", "schema": SCHEMA}, ".schema"),
        ("response_format", FORMAT | {"type": "text"}, ".json_schema"),
        ("response_format", FORMAT | {"json_schema": {"schema": True}}, ".json_schema.schema"),
        (
            "response_format",
            FORMAT | {"json_schema": {"schema": SCHEMA, "strict": "no"}},
            ".json_schema.strict",
        ),
        (
            "response_format",
            FORMAT | {"json_schema": {"schema": SCHEMA, "stict": True}},
            ".json_schema.stict",
        ),
        (
            "response_format",
            FORMAT | {"json_schema": {"schema": {"type": "strin"}}},
            ".json_schema.schema",
        ),
        ("structured_outputs", [], ""),
        ("structured_outputs", {}, ""),
        ("structured_outputs", {"json": None}, ""),
        ("structured_outputs", {"json_object": False}, ""),
        ("structured_outputs", {"json": SCHEMA, "regex": "a"}, ""),
        ("structured_outputs", {"xml": "a"}, ".xml"),
        ("structured_outputs", {"json": SCHEMA, "whitespace_pattern": " "}, ".whitespace_pattern"),
        ("structured_outputs", {"structural_tag": "{}"}, ".structural_tag"),
        ("structured_outputs", {"regex": False}, ".regex"),
        ("structured_outputs", {"regex": "(a"}, ".regex"),
        ("structured_outputs", {"regex": "a" * 8193}, ".regex"),
        ("structured_outputs", {"regex": ""}, ".regex"),
        ("structured_outputs", {"json": "{"}, ".json"),
        ("structured_outputs", {"json": []}, ".json"),
        ("structured_outputs", {"json": {"not": {}}}, ".json"),
        ("structured_outputs", {"json": {"a": "b" * 65536}}, ".json"),
        ("structured_outputs", {"choice": []}, ".choice"),
        ("structured_outputs", {"choice": "a"}, ".choice"),
        ("structured_outputs", {"choice": ["a", ""]}, ".choice[1]"),
        ("structured_outputs", {"grammar": "root ::= x"}, ".grammar"),
        ("structured_outputs", {"json_object": 1}, ".json_object"),
        ("guided_json", False, ""),
        ("guided_regex", 5, ""),
        ("guided_choice", [1], ""),
        ("guided_grammar", "start: a", ""),
        ("guided_json_object", "yes", ""),
    ],
    ids=lambda given: str(given)[:60],
)
def test_what_is_not_understood_is_named(param: str, value: Any, place: str, front: Front) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        for stream in (False, True):
            reply = front.post(path, body | {param: value, "stream": stream})
            assert (reply.status, reply.error["param"]) == (400, param), reply.raw
            assert f"{param}{place} " in reply.error["message"]
            assert "sampling" not in reply.error["message"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("response_format", "structured_outputs"),
        ("structured_outputs", "guided_regex"),
        ("guided_json", "guided_regex"),
    ],
)
def test_two_at_a_time_are_refused(first: str, second: str, told: Front, fake: Fake) -> None:
    asked = {
        "response_format": {"type": "json_object"},
        "structured_outputs": {"regex": "a"},
        "guided_json": SCHEMA,
        "guided_regex": "a",
    }
    reply = told.post("/v1/completions", TEXT | {name: asked[name] for name in (first, second)})
    assert (reply.status, reply.error["param"]) == (400, second)
    assert first in reply.error["message"]
    assert fake.requests == []


def test_an_image_has_none(front: Front) -> None:
    body = {"model": "tiny-image", "guided_choice": ["circle"]}
    reply = front.post("/v1/images/generations", body)
    assert (reply.status, reply.error["param"]) == (400, "guided_choice")
