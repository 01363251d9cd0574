"""The bounds of the numbers of requests: those of their types, and the options in the protos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from concertina.v1 import limits_pb2

_INTEGERS: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@dataclass(frozen=True)
class Bounds:
    """The smallest and the largest value of a number; None if there is none."""

    lowest: float | None
    highest: float | None

    def broken_by(self, value: float) -> float | None:
        """The bound that a value is beyond; None if it is within both."""
        if self.lowest is not None and value < self.lowest:
            return self.lowest
        return self.highest if self.highest is not None and value > self.highest else None


def bounds(kind: type[Message], name: str) -> Bounds:
    """The bounds of a field that is a number, a list of numbers, or a duration in seconds.

    A value that is to be above a bound may be at it here: the server tells these apart.
    """
    field = kind.DESCRIPTOR.fields_by_name[name]
    options: Any = field.GetOptions()
    limits = options.Extensions[limits_pb2.limits]
    lowest = limits.min if limits.HasField("min") else None
    lowest = limits.above if limits.HasField("above") else lowest
    highest = limits.max if limits.HasField("max") else None
    if field.cpp_type not in _INTEGERS:
        return Bounds(lowest, highest)
    least, most = _INTEGERS[field.cpp_type]
    return Bounds(
        least if lowest is None else max(least, int(lowest)),
        most if highest is None else min(most, int(highest)),
    )
