"""Requests of millions of parts, each kind of which once made every other stream wait."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor

from concertina.v1 import generation_service_pb2 as pb

_GENERATE, _RESUME = pb.GenerateRequest.DESCRIPTOR, pb.ResumeRequest.DESCRIPTOR
_UNKNOWN = b"\x78\x01"  # field 15, which no message has


@dataclass(frozen=True)
class Flood:
    """A request on the wire. field: that an error has to name."""

    kind: Descriptor
    content: bytes
    field: str

    @property
    def path(self) -> str:
        """The method that takes it."""
        method = self.kind.name.removesuffix("Request")
        return f"/concertina.v1.GenerationService/{method}"


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


def floods(size: int) -> dict[str, Flood]:
    """Of every repeated field, and of what else there is to repeat, as much as fits into a size."""

    def many(item: bytes) -> bytes:
        return item * (size // len(item))

    def generate(content: bytes, field: str) -> Flood:
        return Flood(_GENERATE, content, field)

    def prompt(content: bytes, field: str) -> Flood:
        return generate(part(2, content), field)

    def sampling(content: bytes, field: str) -> Flood:
        return generate(part(3, content), field)

    def stopping(content: bytes, field: str) -> Flood:
        return generate(part(4, content), field)

    ids, full = "prompt.tokens.ids", b"\x80" * 9 + b"\1"
    return {
        "packed ids": prompt(part(2, part(1, many(b"\1"))), ids),
        "ids of ten bytes": prompt(part(2, part(1, many(full) * 4)), ids),
        "single ids": prompt(part(2, many(b"\x08\1")), ids),
        "ids in chunks": prompt(part(2, many(part(1, b"\1"))), ids),
        "prompts": generate(many(part(2, part(2, b""))), "prompt"),
        "messages": prompt(part(5, many(part(1, b""))), "prompt.messages.messages"),
        "a message": prompt(
            part(5, part(1, many(part(2, b"a")))), "prompt.messages.messages[0].content"
        ),
        "allowed ids": sampling(part(11, many(b"\1")), "sampling.allowed_token_ids"),
        "stop ids": stopping(part(3, many(b"\1")), "stopping.stop_token_ids"),
        "biases": sampling(many(part(10, b"\x08\1\x15\0\0\0\0")), "sampling.logit_bias"),
        "empty biases": sampling(many(part(10, b"")), "sampling.logit_bias"),
        "a full bias": sampling(part(10, many(b"\x08\1")), "sampling.logit_bias"),
        "bad words": sampling(many(part(12, b"a")), "sampling.bad_words"),
        "stop strings": stopping(many(part(2, b"")), "stopping.stop"),
        "a stop string": stopping(part(2, many(b"a")), "stopping.stop[0]"),
        "cursors": Flood(_RESUME, many(part(3, b"")), "cursors"),
        "full cursors": Flood(_RESUME, many(part(3, part(5, b"\1" * 4097))), "cursors[0].last_ids"),
        "text": prompt(part(1, many(b"a")), "prompt.text"),
        "a name": generate(part(1, many(b"a")), "model"),
        "what nobody knows": generate(many(_UNKNOWN), ""),
        "what nobody knows, inside": sampling(many(_UNKNOWN), "sampling"),
        "groups": generate(many(b"\x7b\x7c"), ""),
    }
