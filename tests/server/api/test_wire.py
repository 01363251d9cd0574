"""What is too large, or has too many parts, is refused before it is parsed."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from server.api import wire
from server.api.limits import largest_bytes, require_within_limits
from server.api.wire import fault_of, reader
from server.errors import InvalidRequest
from tests.server.api.bounds import methods
from tests.server.api.floods import floods, part
from tests.server.hostile import messages, mutated

MEBIBYTE = 1024 * 1024
KINDS = {method.input_type.name: method.input_type for method in methods()}
GENERATE = pb.GenerateRequest.DESCRIPTOR


HOSTILE = floods(4 * MEBIBYTE - 100)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_flood_ends_after_few_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flood = HOSTILE[name]
    steps, read_number = 0, wire.Walk.number

    def count(walk: wire.Walk, at: int) -> tuple[int, int]:
        nonlocal steps
        steps += 1
        return read_number(walk, at)

    monkeypatch.setattr(wire.Walk, "number", count)
    refused = reader(flood.kind)(flood.content)
    assert isinstance(refused, InvalidRequest)
    assert refused.field == flood.field and refused.limit
    assert len(refused.message) < 300
    # Each takes less than a microsecond.
    assert steps < 12_000  # a conversation of 1,024 messages has 3,072 fields


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_request_has_a_largest_size(kind: Descriptor) -> None:
    most = largest_bytes(kind)
    for size, fits in ((most, True), (most + 1, False)):
        content = _of_size(size)
        assert len(content) == size
        got = reader(kind)(content)
        assert isinstance(got, InvalidRequest) is not fits
        if isinstance(got, InvalidRequest):
            assert got.limit == most and str(size) in got.message


def _of_size(size: int) -> bytes:
    """A message of a field that nobody knows."""
    for head in range(3, 9):
        content = part(99, b"x" * (size - head))
        if len(content) == size:
            return content
    raise AssertionError(size)


def test_the_field_that_makes_a_request_too_large_is_named() -> None:
    """Each within its bounds, and together too large."""
    ids = pb.TokenIds(ids=[2**31] * 500_000)
    allowed = pb.SamplingParameters(allowed_token_ids=[2**31] * 262_144)
    asked = pb.GenerateRequest(model="m" * 200, prompt=pb.Prompt(tokens=ids), sampling=allowed)
    asked.stopping.stop_token_ids.extend([2**31] * 1000)
    content = asked.SerializeToString() + part(5, part(99, b"x" * 600_000))
    refused = reader(GENERATE)(content)
    assert isinstance(refused, InvalidRequest)
    assert (refused.field, refused.limit) == ("prompt.tokens.ids", 4 * MEBIBYTE)
    assert "shorten" in refused.message


def _kinds() -> Iterator[st.SearchStrategy[Message]]:
    yield messages(pb.GenerateRequest)
    yield messages(pb.ResumeRequest)
    yield messages(session_pb.ContinueRequest)
    yield messages(session_pb.ImportRequest)


@settings(max_examples=500)
@given(st.one_of(*_kinds()))
def test_the_walk_refuses_nothing_that_is_within_its_bounds(request: Message) -> None:
    fault = fault_of(request.DESCRIPTOR, request.SerializeToString())
    if fault is not None:
        with pytest.raises(InvalidRequest):
            require_within_limits(request)


def test_bytes_that_are_no_message_are_left_to_the_parser() -> None:
    rng = random.Random(7)
    whole = pb.GenerateRequest(
        prompt=pb.Prompt(text="x" * 20_000),
        sampling=pb.SamplingParameters(logit_bias={7: 1.0}, bad_words=["a", "b"]),
    ).SerializeToString()
    read, wrong = reader(GENERATE), 0
    for _ in range(2000):
        content = mutated(whole, rng)
        try:
            read(content)
        except DecodeError:
            wrong += 1
    assert wrong > 100


def test_a_refusal_in_place_of_a_request_travels_between_processes() -> None:
    """Ray's own proxy parses requests, and pickles them for a replica."""
    refused = pickle.loads(pickle.dumps(reader(GENERATE)(HOSTILE["text"].content)))
    with pytest.raises(InvalidRequest) as raised:
        require_within_limits(refused)
    assert (raised.value.field, raised.value.limit) == ("prompt.text", MEBIBYTE)
