"""Generates hostile messages, and checks that the server survives them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Test = Callable[..., None]

CASES = {  # by kind: number of cases in the fast form and in the slow form
    "requests": (1_000, 8_000),
    "calls": (400, 4_000),
    "bytes": (500, 5_000),
    "damaged snapshots": (5_000, 22_000),
    "forged snapshots": (200, 2_500),
    "manifests": (400, 5_000),
    "images": (600, 6_000),
}
FORMS = ["fast", pytest.param("slow", marks=pytest.mark.slow)]

# A failed case is not shrunk: for a case that hangs, shrinking takes hours.
_PHASES = (Phase.generate,)
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_EDGES = (-1, 0, 1, 2, 3, 7, 8, 95, 96, 255, 256, 2**31)
_FLOATS = (0.0, -0.0, 1e-45, 1e-30, 0.5, 1.0, 2.0, -2.0, 100.0, 3e38, -3e38)
_NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))


@dataclass
class Tally:
    """Counts cases, to check that the promised number ran."""

    kind: str
    form: str
    cases: int = 0

    @property
    def promised(self) -> int:
        """The number of cases to run."""
        return CASES[self.kind][self.form == "slow"]

    def close(self) -> None:
        """Fails if fewer cases ran."""
        assert self.cases >= self.promised, f"{self.cases} of {self.promised} {self.kind}"


def examples(tally: Tally, strategies: Sequence[st.SearchStrategy[Any]], test: Test) -> None:
    """Runs `test` with values of the strategies, for the promised number of cases."""

    @settings(max_examples=tally.promised, suppress_health_check=list(HealthCheck), phases=_PHASES)
    @given(st.tuples(*strategies))
    def counted(values: tuple[Any, ...]) -> None:
        tally.cases += 1
        test(*values)

    counted()
    tally.close()


def messages(kind: type[Message]) -> st.SearchStrategy[Any]:
    """Messages of a type with any of their fields, with values at and beyond all limits."""
    return _messages(kind.DESCRIPTOR)


@cache
def _messages(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    fields = {
        field.name: st.deferred(lambda field=field: _values(field)) for field in descriptor.fields
    }
    made = GetMessageClass(descriptor)
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: made(**given))


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = (_single(kind.fields_by_name[name]) for name in ("key", "value"))
        return st.dictionaries(key, value, max_size=4)
    single = _single(field)
    return st.lists(single, max_size=4) if field.is_repeated else single


def _single(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=64)
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return _messages(field.message_type)
        case FieldDescriptor.CPPTYPE_STRING:
            odd = st.sampled_from(["", "\0", "../x", "é" * 40, "a" * 300, "star", "\U0001f600"])
            return odd | st.text(max_size=12)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.integers(0, 9)
        case FieldDescriptor.CPPTYPE_FLOAT:
            return st.sampled_from([*_FLOATS, *_NO_NUMBERS]) | st.floats(width=32)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return st.sampled_from([*_FLOATS, *_NO_NUMBERS]) | st.floats()
    low, high = _INTEGERS[field.cpp_type]
    return st.sampled_from([edge for edge in (low, *_EDGES, high) if low <= edge <= high])


def mutated(content: bytes, rng: random.Random) -> bytes:
    """`content` with a few bytes changed, removed, doubled or added."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(out))
        match rng.randrange(6):
            case 0:
                del out[at:]
            case 1:
                del out[at : at + rng.randint(1, 8)]
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                out[at:at] = out[at : at + rng.randint(1, 64)]
            case 4:
                out[at : at + 4] = struct.pack("<i", rng.choice((-1, 0, 2**31 - 1, -(2**31))))
            case _ if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


class Caller:
    """The context of a call, for a handler."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        """No metadata: these servers have no keys."""
        return []

    def set_code(self, code: grpc.StatusCode) -> None:
        """Records the status."""
        self.code = code

    def set_trailing_metadata(self, trailing_metadata: object) -> None:
        pass

    def set_details(self, details: str) -> None:
        """Records the message of the status."""
        self.details = details

    def check(self) -> None:
        """Checks that the call did not end with an internal error."""
        assert self.code is not grpc.StatusCode.INTERNAL, self.details
        assert harmless(self.details)


def harmless(text: str) -> bool:
    """Whether a message shows nothing of the server's code."""
    words = ("internal error", "Traceback", ".py", "Error:", "object at 0x")
    return not any(word in text for word in words) and len(text) < 1_000
