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
from tests.server.hostile import messages, mutated

MEBIBYTE = 1024 * 1024
KINDS = {method.input_type.name: method.input_type for method in methods()}
GENERATE, RESUME = pb.GenerateRequest.DESCRIPTOR, pb.ResumeRequest.DESCRIPTOR
UNKNOWN = b"\x78\x01"  # field 15, which no message has


def number(value: int) -> bytes:
    """A varint."""
    parts = b""
    while value > 127:
        parts += bytes([value & 127 | 128])
        value >>= 7
    return parts + bytes([value])


def part(field: int, content: bytes) -> bytes:
    """A field of bytes, as it is on the wire."""
    return number(field << 3 | 2) + number(len(content)) + content


def many(item: bytes, size: int = 4 * MEBIBYTE - 100) -> bytes:
    """As many of an item as fit into the largest request."""
    return item * (size // len(item))


HOSTILE = {
    "packed ids": (GENERATE, part(2, part(2, part(1, many(b"\1")))), "prompt.tokens.ids"),
    "ids of ten bytes": (
        GENERATE,
        part(2, part(2, part(1, many(b"\x80" * 9 + b"\1") * 4))),
        "prompt.tokens.ids",
    ),
    "single ids": (GENERATE, part(2, part(2, many(b"\x08\1"))), "prompt.tokens.ids"),
    "ids in chunks": (GENERATE, part(2, part(2, many(part(1, b"\1")))), "prompt.tokens.ids"),
    "prompts": (GENERATE, many(part(2, part(2, b""))), "prompt.tokens"),
    "allowed ids": (GENERATE, part(3, part(11, many(b"\1"))), "sampling.allowed_token_ids"),
    "stop ids": (GENERATE, part(4, part(3, many(b"\1"))), "stopping.stop_token_ids"),
    "biases": (
        GENERATE,
        part(3, many(part(10, b"\x08\1\x15\0\0\0\0"))),
        "sampling.logit_bias",
    ),
    "empty biases": (GENERATE, part(3, many(part(10, b""))), "sampling.logit_bias"),
    "a full bias": (GENERATE, part(3, part(10, many(b"\x08\1"))), "sampling.logit_bias"),
    "bad words": (GENERATE, part(3, many(part(12, b"a"))), "sampling.bad_words"),
    "stop strings": (GENERATE, part(4, many(part(2, b""))), "stopping.stop"),
    "a stop string": (GENERATE, part(4, part(2, many(b"a"))), "stopping.stop[0]"),
    "cursors": (RESUME, many(part(3, b"")), "cursors"),
    "full cursors": (RESUME, many(part(3, part(5, b"\1" * 4097))), "cursors[0].last_ids"),
    "text": (GENERATE, part(2, part(1, many(b"a"))), "prompt.text"),
    "a name": (GENERATE, part(1, many(b"a")), "model"),
    "what nobody knows": (GENERATE, many(UNKNOWN), ""),
    "what nobody knows, inside": (GENERATE, part(3, many(UNKNOWN)), "sampling"),
    "groups": (GENERATE, many(b"\x7b\x7c"), ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_flood_ends_after_few_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, content, field = HOSTILE[name]
    steps, read_number = 0, wire._Walk._varint

    def count(walk: wire._Walk, at: int) -> tuple[int, int]:
        nonlocal steps
        steps += 1
        return read_number(walk, at)

    monkeypatch.setattr(wire._Walk, "_varint", count)
    refused = reader(kind)(content)
    assert isinstance(refused, InvalidRequest)
    assert refused.field == field and refused.limit
    assert len(refused.message) < 300
    # Each takes less than a microsecond.
    assert steps < 4000


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
        with pytest.raises(InvalidRequest) as raised:
            require_within_limits(request)
        assert raised.value.limit is not None


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
    refused = pickle.loads(pickle.dumps(reader(GENERATE)(HOSTILE["text"][1])))
    with pytest.raises(InvalidRequest) as raised:
        require_within_limits(refused)
    assert (raised.value.field, raised.value.limit) == ("prompt.text", MEBIBYTE)
