"""Holds every field of a request to its bounds, which are options of the fields in the protos.

The checks of a type of message are made once, from its descriptor. They know no model: what depends
on one, or on several fields, is checked where the request is used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from concertina.v1 import limits_pb2
from server.errors import InvalidRequest

_DURATION: Final = "google.protobuf.Duration"
_FLOATS: Final = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
_UNBOUNDED: Final = (FieldDescriptor.CPPTYPE_BOOL, FieldDescriptor.CPPTYPE_ENUM)


@dataclass(frozen=True)
class Fault:
    """A bound that a request breaks: of which field, what is wrong, and the bound if there is one.

    text: goes on after the name of the field. limit: see RequestError.
    """

    field: str
    text: str
    limit: float | None

    @property
    def error(self) -> InvalidRequest:
        """The error to raise."""
        message = f"{self.field or 'the request'} {self.text}"
        return InvalidRequest(message, field=self.field, limit=self.limit)

    def below(self, name: str) -> Fault:
        """The same, as seen from the message that has the field's message in its field `name`."""
        return replace(self, field=f"{name}.{self.field}")


_Check = Callable[[Any], Fault | None]


def require_within_limits(request: Message | InvalidRequest) -> None:
    """Raise InvalidRequest if a field breaks its bounds, or if the request is such an error itself.

    A request that is too large to be parsed is an error in its place: see `server.api.wire`.
    """
    if isinstance(request, InvalidRequest):
        raise request
    if (fault := _message_check(request.DESCRIPTOR)(request)) is not None:
        raise fault.error


def limits_of(field: FieldDescriptor) -> limits_pb2.Limits | None:
    """The bounds of a field; None if it has none."""
    options: Any = field.GetOptions()
    if not options.HasExtension(limits_pb2.limits):
        return None
    found: limits_pb2.Limits = options.Extensions[limits_pb2.limits]
    return found


def needs_limits(field: FieldDescriptor) -> bool:
    """Whether a field of a request must have bounds: all but single messages, bools and enums."""
    if field.is_repeated or is_duration(field):
        return True
    return field.message_type is None and field.cpp_type not in _UNBOUNDED


def largest_bytes(kind: Descriptor) -> int:
    """Most bytes of a request of this type."""
    options: Any = kind.GetOptions()
    return int(options.Extensions[limits_pb2.largest_bytes])


def is_map(field: FieldDescriptor) -> bool:
    """Whether a field is a map."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def is_duration(field: FieldDescriptor) -> bool:
    """Whether a field is a duration."""
    return field.message_type is not None and field.message_type.full_name == _DURATION


def too_many(name: str, count: int, field: FieldDescriptor, limits: limits_pb2.Limits) -> Fault:
    """The fault of a list that has more items than its bound."""
    items = "strings" if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else "items"
    text = f"has {count} {items}, the limit is {limits.max_items}: send fewer"
    return Fault(name, text, limits.max_items)


def wrong_size(name: str, size: int, limits: limits_pb2.Limits) -> Fault:
    """The fault of a string or bytes of such a size."""
    least, most = limits.min_bytes, limits.max_bytes
    allowed = f"it must have {least} to {most}" if least else f"the limit is {most}: shorten it"
    return Fault(name, f"has {size} bytes; {allowed}", least if size < least else most)


def range_of(field: FieldDescriptor, limits: limits_pb2.Limits) -> str:
    """The bounds of a number in words, such as `between 0 and 1`; empty if there are none."""
    low, high = (f"{bound:.17g}" for bound in (limits.min, limits.max))
    least = f"above {limits.above:.17g}" if limits.HasField("above") else ""
    if limits.HasField("max"):
        if least:
            return f"{least} and at most {high}"
        return f"between {low} and {high}" if limits.HasField("min") else f"at most {high}"
    if limits.HasField("min"):
        least = f"at least {low}"
    finite = "finite and " if least and field.cpp_type in _FLOATS else ""
    return finite + least


@cache
def _message_check(kind: Descriptor) -> _Check:
    """The check of a message of this type, for its fields in their order."""
    made = {field.number: _field_check(field) for field in kind.fields}
    checks = {number: found for number, found in made.items() if found is not None}
    # A field that cannot be left out has its default value instead, which may be out of bounds.
    needed = [
        (field.name, checks[field.number])
        for field in kind.fields
        if field.number in checks
        and not (field.has_presence or field.is_repeated)
        and checks[field.number](field.default_value)
    ]

    def check(message: Message) -> Fault | None:
        for field, value in message.ListFields():
            found = checks.get(field.number)
            if found is not None and (fault := found(value)) is not None:
                return fault
        for name, found in needed:
            if (fault := found(getattr(message, name))) is not None:
                return fault
        return None

    return check


def _field_check(field: FieldDescriptor) -> _Check | None:
    limits = limits_of(field)
    if limits is not None and is_map(field):
        return _map_check(field, limits)
    one = _value_check(field, limits)
    if not field.is_repeated:
        return one
    return None if limits is None else _list_check(field, limits, one)


def _value_check(field: FieldDescriptor, limits: limits_pb2.Limits | None) -> _Check | None:
    """The check of one value of the field."""
    if field.message_type is not None and not is_duration(field):
        inner, name = _message_check(field.message_type), field.name

        def check_message(message: Message) -> Fault | None:
            fault = inner(message)
            return None if fault is None else fault.below(name)

        return check_message
    if limits is None:
        return None
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _size_check(field, limits) if limits.max_bytes else None
    return _number_check(field, limits) if range_of(field, limits) else None


def _number_check(field: FieldDescriptor, limits: limits_pb2.Limits) -> _Check:
    name, unit, allowed = field.name, " s" if is_duration(field) else "", range_of(field, limits)
    above = limits.above if limits.HasField("above") else -math.inf
    low = limits.min if limits.HasField("min") else -math.inf
    high = limits.max if limits.HasField("max") else math.inf
    most = min(high, sys.float_info.max) if field.cpp_type in _FLOATS else high
    bound = above if limits.HasField("above") else low

    def check(value: float) -> Fault | None:
        if low <= value <= most and value > above:
            return None
        limit = high if value > most else bound
        text = f"is {value}{unit}; it must be {allowed}"
        return Fault(name, text, limit if math.isfinite(limit) else None)

    if not is_duration(field):
        return check
    return lambda duration: check(duration.seconds + duration.nanos / 1e9)


def _size_check(field: FieldDescriptor, limits: limits_pb2.Limits) -> _Check:
    name, least, most = field.name, limits.min_bytes, limits.max_bytes

    def check(value: str | bytes) -> Fault | None:
        is_short = isinstance(value, bytes) or value.isascii()
        size = len(value) if is_short else len(value.encode())  # type: ignore[union-attr]
        return None if least <= size <= most else wrong_size(name, size, limits)

    return check


def _list_check(field: FieldDescriptor, limits: limits_pb2.Limits, one: _Check | None) -> _Check:
    name, most = field.name, limits.max_items

    def check(values: Any) -> Fault | None:
        if len(values) > most:
            return too_many(name, len(values), field, limits)
        for index, value in enumerate(values if one is not None else ()):
            if one is not None and (fault := one(value)) is not None:
                return _of_item(fault, name, index)
        return None

    return check


def _map_check(field: FieldDescriptor, limits: limits_pb2.Limits) -> _Check:
    assert field.message_type is not None
    name, most = field.name, limits.max_items
    one = _value_check(field.message_type.fields_by_name["value"], limits)

    def check(values: Any) -> Fault | None:
        if len(values) > most:
            return too_many(name, len(values), field, limits)
        for key, value in values.items():
            if one is not None and (fault := one(value)) is not None:
                return replace(fault, field=f"{name}[{key}]")
        return None

    return check


def _of_item(fault: Fault, name: str, index: int) -> Fault:
    """The fault of a list's item, which says which one it is."""
    return replace(fault, field=f"{name}[{index}]{fault.field.removeprefix(name)}")
