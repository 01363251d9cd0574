"""What is refused, with a status, the field, and words that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.auth.api_keys import Caller, new_key, write_keys
from tests.concertina.conftest import Fake, Status
from tests.server.http.gateways import Front, fronting, serving

TEXT = {"model": "tiny-text", "prompt": "a", "max_tokens": 2}
CHAT = {"model": "tiny-text", "messages": [{"role": "user", "content": "a"}]}
PROSE = {"model": "prose", "prompt": "a"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("max_tokens", 1000),
        ("max_tokens", 1.5),
        ("max_tokens", 0),
        ("n", 0),
        ("n", 10**30),
        ("seed", 2**64),
        ("logprobs", 21),
        ("logprobs", True),
        ("stop", [1]),
        ("stop", ["x"] * 17),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"300": 1}),
        ("logit_bias", {"1": 101}),
        ("allowed_token_ids", []),
        ("bad_words", [""]),
        ("prompt", {}),
        ("prompt", []),
        ("prompt", ["a", 1]),
        ("prompt", [300]),
        ("prompt", [-1]),
        ("prompt", "a" * 97),
        ("stream_options", {"include_usage": True}),
        ("keep", 5),
        ("best_of", 3),
        ("priority", 101),
        ("suffix", "b"),
        ("model", 5),
        ("grammar", "root ::= x"),
        ("guided_whitespace_pattern", " "),
        ("use_beam_search", True),
        ("prompt_logprobs", 1),
        ("add_special_tokens", False),
        ("repeat_penalty", 1.1),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(field: str, value: Any, front: Front) -> None:
    reply = front.post("/v1/completions", {**TEXT, field: value})
    assert (reply.status, reply.error["param"]) == (400, field), reply.raw
    assert reply.error["type"] == "invalid_request_error"
    assert field in reply.error["message"]
    # The same where the answer is events: it is refused before they begin.
    streamed = front.post("/v1/completions", {**TEXT, "stream": True, field: value})
    assert streamed.status == (200 if field in ("stream_options", "keep") else 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", None),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("top_logprobs", 3),
        ("max_completion_tokens", 0),
        ("reasoning_effort", "high"),
        ("continue_final_message", True),
        ("echo", True),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_chat_is_named(field: str, value: Any, front: Front) -> None:
    reply = front.post("/v1/chat/completions", {**CHAT, field: value})
    assert (reply.status, reply.error["param"]) == (400, field), reply.raw


def test_what_changes_nothing_and_what_is_unknown_is_ignored(front: Front) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "best_of": 1,
        "suffix": None,
        "length_penalty": 1.0,
        "skip_special_tokens": True,
        "what_is_this": [1, {}],
    }
    assert front.post("/v1/completions", {**TEXT, **neutral}).status == 200


def test_models_that_are_not_there_or_write_no_text(front: Front) -> None:
    unknown = front.post("/v1/completions", {**TEXT, "model": "x"})
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
    image = front.post("/v1/completions", {"model": "tiny-image", "max_tokens": 2})
    assert (image.status, image.error["param"]) == (400, "model")
    assert "/v1/images/generations" in image.error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000], ids=repr)
def test_what_is_no_object(body: bytes, front: Front) -> None:
    reply = front.call("POST", "/v1/completions", body)
    assert reply.status == 400
    assert "JSON" in reply.error["message"]


def test_bodies_of_pages_of_other_sites(front: Front) -> None:
    body = json.dumps(TEXT).encode()
    assert front.call("POST", "/v1/completions", body, Content_Type="text/plain").status == 415


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("evil.example", 403)],
    ids=str,
)
def test_only_known_hosts(host: str, status: int, front: Front) -> None:
    assert front.call("GET", "/version", Host=host).status == status


def test_an_empty_key_is_none(front: Front) -> None:
    for given in ("Bearer", "Bearer ", "bearer  "):
        assert front.post("/v1/completions", TEXT, Authorization=given).status == 200


def test_keys_are_passed_on(text_bundle: Path, image_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key, secret = new_key(Caller("me", models=("tiny-text",)))
    write_keys(keys, [key])
    with serving(text_bundle, image_bundle, keys=keys) as upstream, fronting(upstream) as front:
        for given in (None, "Bearer wrong", secret, "Bearer", f"Basic {secret}"):
            header = {} if given is None else {"Authorization": given}
            reply = front.post("/v1/completions", TEXT, **header)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        good = {"Authorization": f"Bearer {secret}"}
        assert front.post("/v1/completions", TEXT, **good).status == 200
        served = front.call("GET", "/v1/models", **good).json["data"]
        assert [each["id"] for each in served] == ["tiny-text"]
        other = front.post("/v1/images/generations", {"model": "tiny-image"}, **good)
        assert other.status == 403
        assert front.call("GET", "/health").status == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (grpc.StatusCode.UNAUTHENTICATED, 401),
        (grpc.StatusCode.PERMISSION_DENIED, 403),
        (grpc.StatusCode.NOT_FOUND, 404),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 408),
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.UNIMPLEMENTED, 500),
    ],
    ids=str,
)
def test_statuses(code: grpc.StatusCode, status: int, told: Front, fake: Fake) -> None:
    fake.script = [Status(code, "so it is")]
    for body in (PROSE, {**PROSE, "stream": True}):
        reply = told.post("/v1/completions", body)
        assert reply.status == status, reply.raw
        assert ("retry-after" in reply.headers) == (status == 429)


def test_a_full_server_says_when_to_come_again(told: Front, fake: Fake) -> None:
    fake.script = [
        fake.error(1, "RESOURCE_EXHAUSTED", "it is full"),
        Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "it is full"),
    ]
    reply = told.post("/v1/completions", PROSE)
    assert reply.status == 429
    assert reply.headers["retry-after"] == "3"
    assert reply.headers["retry-after-ms"] == "2500"


def test_no_server_behind_it() -> None:
    with fronting("127.0.0.1:1") as front:
        reply = front.post("/v1/completions", TEXT)
        assert (reply.status, reply.error["code"]) == (503, "unavailable")
        assert front.call("GET", "/health").status == 503
