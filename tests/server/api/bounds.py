"""Requests at every bound of every field, and one beyond it, made from the table of the bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
from google.protobuf.descriptor import (
    Descriptor,
    FieldDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from concertina import v1
from concertina.v1 import limits_pb2
from server.api.limits import is_duration, is_map, limits_of

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def services() -> list[ServiceDescriptor]:
    """All services of the API."""
    names = [each.name for each in iter_modules(v1.__path__, f"{v1.__name__}.")]
    return [
        service
        for name in names
        if name.endswith("_service_pb2")
        for service in import_module(name).DESCRIPTOR.services_by_name.values()
    ]


def methods() -> list[MethodDescriptor]:
    """All methods of the API."""
    return [method for service in services() for method in service.methods]


@dataclass(frozen=True)
class Place:
    """A field that a request can have. path: of the fields that lead to it, and itself."""

    kind: Descriptor
    path: tuple[FieldDescriptor, ...]

    @property
    def name(self) -> str:
        """As an error names it, where every list has one item."""
        *outer, last = self.path
        indexed = [f"{field.name}[0]" if field.is_repeated else field.name for field in outer]
        return ".".join([*indexed, last.name])

    def request(self, value: Any) -> Message:
        """A request with this value, and nothing else but what every request must have."""
        *outer, last = self.path
        request = message = GetMessageClass(self.kind)()
        for field in self.kind.fields:
            limits = limits_of(field)
            if limits is not None and limits.min > 0 and not field.has_presence:
                setattr(request, field.name, int(limits.min))
        for field in outer:
            inner = getattr(message, field.name)
            message = inner.add() if field.is_repeated else inner
            message.SetInParent()
        if is_map(last):
            getattr(message, last.name).update(value)
        elif last.is_repeated and last.message_type:
            for _ in range(value):
                getattr(message, last.name).add()
        elif last.is_repeated:
            getattr(message, last.name).extend(value)
        elif last.message_type:
            getattr(message, last.name).CopyFrom(value)
        else:
            setattr(message, last.name, value)
        return request


def places(kind: Descriptor, path: tuple[FieldDescriptor, ...] = ()) -> Iterator[Place]:
    """Every field of a request of this type, and of the messages in it."""
    root = path[0].containing_type if path else kind
    for field in kind.fields:
        yield Place(root, (*path, field))
        if field.message_type and not (is_map(field) or is_duration(field)):
            yield from places(field.message_type, (*path, field))


@dataclass(frozen=True)
class Case:
    """A request, and of a wrong one the field and the limit that the refusal names."""

    request: Message
    field: str = ""
    limit: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether it is within its bounds."""
        return not self.field


def cases(kind: Descriptor) -> Iterator[Case]:
    """Requests at each bound of each field, and beyond it."""
    for place in places(kind):
        limits = limits_of(place.path[-1])
        if limits is not None:
            yield from _cases(place, place.path[-1], limits)


def _cases(place: Place, field: FieldDescriptor, limits: limits_pb2.Limits) -> Iterator[Case]:
    most, name = limits.max_items, place.name
    if is_map(field):
        yield Case(place.request(dict.fromkeys(range(most), 0)))
        yield Case(place.request(dict.fromkeys(range(most + 1), 0)), name, most)
        value = field.message_type.fields_by_name["value"]
        for one, limit in _values(value, limits):
            wrong = (f"{name}[7]", limit) if limit is not OK else ()
            yield Case(place.request({7: one}), *wrong)
    elif field.is_repeated and field.message_type:
        yield Case(place.request(most))
        yield Case(place.request(most + 1), name, most)
    elif field.is_repeated:
        right = next(one for one, limit in _values(field, limits) if limit is OK)
        yield Case(place.request([right] * most))
        yield Case(place.request([right] * (most + 1)), name, most)
        for one, limit in _values(field, limits):
            wrong = (f"{name}[1]", limit) if limit is not OK else ()
            yield Case(place.request([right, one]), *wrong)
    else:
        for one, limit in _values(field, limits):
            wrong = (name, limit) if limit is not OK else ()
            yield Case(place.request(one), *wrong)


OK = object()


def _values(field: FieldDescriptor, limits: limits_pb2.Limits) -> list[tuple[Any, Any]]:
    """Single values of a field, each with the limit that it breaks, or OK."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return list(_strings(field, limits))
    if is_duration(field):
        return [(_duration(s, ns), limit) for s, ns, limit in _seconds(limits)]
    if field.cpp_type in _INTEGERS:
        return list(_integers(field, limits))
    return list(_floats(limits))


def _strings(field: FieldDescriptor, limits: limits_pb2.Limits) -> Iterator[tuple[Any, Any]]:
    least, most = limits.min_bytes, limits.max_bytes
    a = b"a" if field.type == FieldDescriptor.TYPE_BYTES else "a"
    yield a * most, OK
    yield a * least, OK
    yield a * (most + 1), most
    if least:
        yield a * (least - 1), least
    if isinstance(a, str):
        yield "é" * (most // 2), OK
        yield "é" * (most // 2 + 1), most


def _seconds(limits: limits_pb2.Limits) -> Iterator[tuple[int, int, Any]]:
    yield int(limits.max), 0, OK
    yield int(limits.max) + 1, 0, limits.max
    if limits.HasField("above"):
        yield 0, 1, OK
        yield 0, 0, limits.above
    else:
        yield 0, 0, OK
    yield 0, -1, 0
    yield -(2**63), 0, 0
    yield 2**63 - 1, 0, limits.max


def _duration(seconds: int, nanos: int) -> Duration:
    return Duration(seconds=seconds, nanos=nanos)


def _integers(field: FieldDescriptor, limits: limits_pb2.Limits) -> Iterator[tuple[Any, Any]]:
    low, high = _INTEGERS[field.cpp_type]
    least = int(limits.min) if limits.HasField("min") else low
    most = int(limits.max) if limits.HasField("max") else high
    yield least, OK
    yield most, OK
    yield from ((value, least) for value in {least - 1, low} if low <= value < least)
    yield from ((value, most) for value in {most + 1, high} if most < value <= high)


def _floats(limits: limits_pb2.Limits) -> Iterator[tuple[Any, Any]]:
    low = limits.above if limits.HasField("above") else limits.min
    high = limits.max if limits.HasField("max") else None
    up, down = np.float32(np.inf), np.float32(-np.inf)
    if limits.HasField("above"):
        yield float(np.nextafter(np.float32(low), up)), OK
        yield low, low
    else:
        yield low, OK
    yield float(np.nextafter(np.float32(low), down)), low
    if high is None:
        yield float(np.finfo(np.float32).max), OK
    else:
        yield high, OK
        yield float(np.nextafter(np.float32(high), up)), high
    yield math.inf, high
    yield -math.inf, low
    yield math.nan, low
