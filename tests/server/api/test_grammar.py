"""What an output must be, from the message to the engine's request and back, and to a snapshot."""

from __future__ import annotations

import time
from array import array
from typing import Any

import pytest

from concertina.v1 import generation_service_pb2 as pb
from server.api.convert import accepted_message, request_message
from server.api.limits import require_within_limits
from server.api.validate import generate_request
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.errors import InvalidRequest, SnapshotRefused
from server.request import Lease, Request
from server.snapshots.request_codec import requests_from, stored_request

CONFIG = EngineConfig(slots=4, queue_limit=6, stream_buffer=32)
GRAMMARS: dict[str, dict[str, Any]] = {
    "json_schema": {"json_schema": '{"type": "boolean"}'},
    "json_object": {"json_object": pb.JsonObject()},
    "regex": {"regex": "[ab]+"},
    "choice": {"choice": pb.Choice(texts=["yes", "no"])},
    "lark": {"lark": 'start: "a" | "b"'},
}


def requests_of(bundle: Bundle, n: int = 1, **grammar: Any) -> tuple[Request, ...]:
    """The outputs of a request whose outputs are what `grammar` says."""
    request = pb.GenerateRequest(
        sampling=pb.SamplingParameters(seed=1, grammar=pb.Grammar(**grammar)),
        output=pb.OutputOptions(n=n),
    )
    require_within_limits(request)
    return generate_request(bundle, request, CONFIG)


@pytest.mark.parametrize("kind", GRAMMARS)
def test_it_is_echoed_and_asked_for_again(text: Bundle, kind: str) -> None:
    requests = requests_of(text, **GRAMMARS[kind])
    lease = Lease("s", requests, accepted_at=time.time())
    sent = pb.Grammar(**GRAMMARS[kind])
    assert accepted_message(text, lease, False).sampling.grammar == sent
    assert generate_request(text, request_message(text, lease), CONFIG) == requests


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_snapshot_keeps_it(text: Bundle, kind: str) -> None:
    requests = requests_of(text, n=2, **GRAMMARS[kind])
    restored = requests_from(text, stored_request(requests))
    assert restored == requests
    grammar = restored[1].sampling.grammar
    assert grammar is not None and grammar.kind == kind and grammar.beginning.allowed()[0].any()


@pytest.mark.parametrize(
    ("kind", "texts"), [("regex", ["(a"]), ("xml", ["a"]), ("choice", [])], ids=str
)
def test_a_snapshot_with_another_grammar_is_refused(
    text: Bundle, kind: str, texts: list[str]
) -> None:
    stored = stored_request(requests_of(text, **GRAMMARS["regex"]))
    stored.sampling.grammar.kind = kind
    stored.sampling.grammar.texts[:] = texts
    with pytest.raises(SnapshotRefused, match="grammar is not usable here"):
        requests_from(text, stored)


def test_other_requests_have_none(text: Bundle) -> None:
    (request,) = generate_request(text, pb.GenerateRequest(), CONFIG)
    assert request.sampling.grammar is None
    lease = Lease("s", (request,), accepted_at=time.time())
    assert not accepted_message(text, lease, False).sampling.HasField("grammar")
    assert requests_from(text, stored_request((request,))) == (request,)


def test_requests_with_other_grammars_differ(text: Bundle) -> None:
    first, again = (requests_of(text, regex="a") for _ in range(2))
    assert first == again
    assert first != requests_of(text, regex="b") != requests_of(text, lark="b: /b/\nstart: b")


def test_it_counts_in_the_memory_of_a_request(text: Bundle) -> None:
    small, large = (requests_of(text, choice=pb.Choice(texts=["a" * n]))[0] for n in (1, 1000))
    assert small.lists_bytes > 1 << 20
    assert large.lists_bytes == small.lists_bytes + 4 * 999


@pytest.mark.parametrize(
    ("grammar", "field", "limit"),
    [
        ({}, "sampling.grammar", None),
        ({"regex": ""}, "sampling.grammar.regex", 1),
        ({"regex": "(a"}, "sampling.grammar.regex", None),
        ({"regex": "a" * 8193}, "sampling.grammar.regex", 8192),
        ({"json_schema": " " * 65537}, "sampling.grammar.json_schema", 65536),
        ({"lark": "a" * 65537}, "sampling.grammar.lark", 65536),
        ({"choice": pb.Choice()}, "sampling.grammar.choice.texts", 1),
        ({"choice": pb.Choice(texts=["a", ""])}, "sampling.grammar.choice.texts[1]", 1),
        ({"choice": pb.Choice(texts=["a"] * 1025)}, "sampling.grammar.choice.texts", 1024),
        ({"choice": pb.Choice(texts=["a" * 1024] * 65)}, "sampling.grammar.choice.texts", 65536),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_is_wrong_is_named(
    text: Bundle, grammar: dict[str, Any], field: str, limit: float | None
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        requests_of(text, **grammar)
    assert (refused.value.field, refused.value.limit) == (field, limit)
    assert field in refused.value.message


def test_a_model_of_images_refuses_it_by_name(image: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="tiny-image makes images") as refused:
        requests_of(image, regex="a")
    assert refused.value.field == "sampling.grammar"


def test_what_was_generated_before_a_pause_must_fit(text: Bundle) -> None:
    grammar = requests_of(text, regex="[ab]+")[0].sampling.grammar
    assert grammar is not None
    assert grammar.beginning.fits(array("B", b"abab"))
    assert not grammar.beginning.fits(array("B", b"abc"))
