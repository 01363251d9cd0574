"""Reads requests from the wire: what is too large is refused before it is parsed.

To parse a message of millions of small parts takes a good part of a second, in which nothing else
runs in the process, since protobuf holds the interpreter's lock. So the parts of a large message
are counted first, by a walk over their tags that ends with the first part too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from concertina.v1 import (
    generation_service_pb2_grpc,
    limits_pb2,
    model_service_pb2_grpc,
    session_service_pb2_grpc,
)
from server.api.limits import Fault, is_map, largest_bytes, limits_of, too_many, wrong_size
from server.errors import InvalidRequest

Reader = Callable[[bytes], "Message | InvalidRequest"]

_SMALL_BYTES: Final = 16 * 1024  # parsed within a fraction of a millisecond, whatever they are
_SPARE_PARTS: Final = 256  # fields that we do not know, or that are sent twice
_ENTRY_BYTES: Final = 64  # no entry of a map of numbers is larger
_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)


def add_generation(servicer: Any, server: Any) -> None:
    """Add the GenerationService to a server, as gRPC's function does, with readers from here."""
    _add(generation_service_pb2_grpc.add_GenerationServiceServicer_to_server, servicer, server)


def add_models(servicer: Any, server: Any) -> None:
    """The same for the ModelService."""
    _add(model_service_pb2_grpc.add_ModelServiceServicer_to_server, servicer, server)


def add_sessions(servicer: Any, server: Any) -> None:
    """The same for the SessionService."""
    _add(session_service_pb2_grpc.add_SessionServiceServicer_to_server, servicer, server)


class _Registered:
    """What a generated function adds to a server."""

    service: str
    handlers: dict[str, Any]

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.service, self.handlers = service, handlers


def _add(add: Callable[[Any, Any], None], servicer: Any, server: Any) -> None:
    made = _Registered()
    add(servicer, made)
    methods = Default().FindServiceByName(made.service).methods_by_name
    handlers = {
        name: handler._replace(request_deserializer=reader(methods[name].input_type))
        for name, handler in made.handlers.items()
    }
    generic = grpc.method_handlers_generic_handler(made.service, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(made.service, handlers)


def reader(kind: Descriptor) -> Reader:
    """Parses messages of a type. One that is too large, or has too many parts, becomes an error.

    An error in place of a request is raised by `require_within_limits`, once it is known who calls.
    """
    parse: Callable[[bytes], Message] = GetMessageClass(kind).FromString
    most = min(_SMALL_BYTES, largest_bytes(kind))

    def read(content: bytes) -> Message | InvalidRequest:
        if len(content) > most and (fault := fault_of(kind, content)) is not None:
            return fault.error
        return parse(content)

    return read


def fault_of(kind: Descriptor, content: bytes) -> Fault | None:
    """The first bound that a message on the wire breaks, by the number and size of its parts.

    Finds none in bytes that are no message: the parser says so.
    """
    walk = Walk(content, _parts(kind) + _SPARE_PARTS)
    try:
        fault = walk.message(_shape(kind), 0, len(content), "")
    except IndexError:
        fault = None
    if fault is not None or len(content) <= (most := largest_bytes(kind)):
        return fault
    _, name = walk.largest
    is_large = (
        f"makes the request {len(content)} bytes large" if name else f"has {len(content)} bytes"
    )
    return Fault(name, f"{is_large}, the limit is {most}: shorten it", most)


@dataclass(frozen=True)
class _Part:
    """A field as it is on the wire. shape: of the message that it is, if it is one."""

    name: str
    field: FieldDescriptor
    limits: limits_pb2.Limits
    shape: dict[int, _Part] | None
    is_map: bool
    is_list: bool
    is_text: bool


@cache
def _shape(kind: Descriptor) -> dict[int, _Part]:
    return {
        field.number: _Part(
            field.name,
            field,
            limits_of(field) or limits_pb2.Limits(),
            None if is_map(field) or field.message_type is None else _shape(field.message_type),
            is_map(field),
            field.is_repeated,
            field.cpp_type == FieldDescriptor.CPPTYPE_STRING,
        )
        for field in kind.fields
    }


@cache
def _parts(kind: Descriptor) -> int:
    """Largest number of fields on the wire of a message within its bounds, lists packed."""
    count = 0
    for part in _shape(kind).values():
        one = 1 if part.shape is None else 1 + _parts(part.field.message_type)
        packed = part.is_list and not (part.shape or part.is_map or part.is_text)
        count += one * (part.limits.max_items if part.is_list and not packed else 1)
    return count


@dataclass
class Walk:
    """A walk over the tags of a message. Raises IndexError for bytes that are none.

    left: fields that may still come. largest: bytes and name of the longest field so far.
    """

    content: bytes
    most: int
    left: int = field(init=False)
    largest: tuple[int, str] = (0, "")

    def __post_init__(self) -> None:
        self.left = self.most

    def message(self, shape: dict[int, _Part], at: int, end: int, prefix: str) -> Fault | None:
        """Walk over the message from `at` to `end`. prefix: of the names of its fields."""
        counts: dict[int, int] = {}
        while at < end:
            tag, at = self.number(at)
            part, form, size = shape.get(tag >> 3), tag & 7, 0
            if form == _VARINT:
                _, at = self.number(at)
            elif form == _BYTES:
                size, at = self.number(at)
            elif form in (_FIXED32, _FIXED64):
                at += 4 if form == _FIXED32 else 8
            elif form not in (_GROUP, _GROUP_END):
                raise IndexError(at)
            if at + size > end:
                raise IndexError(at)
            self.left -= 1
            if self.left < 0:
                name = prefix + part.name if part else prefix.rpartition(".")[0]
                text = f"comes after {self.most} fields: send fewer, and lists of numbers packed"
                return Fault(name, text, self.most)
            if part is None:
                self.largest = max(self.largest, (size, prefix.rpartition(".")[0]))
            else:
                count = counts[tag >> 3] = counts.get(tag >> 3, 0) + self._items(part, at, size)
                if (fault := self._of_part(part, prefix, count, at, size)) is not None:
                    return fault
            at += size
        return None

    def _of_part(self, part: _Part, prefix: str, count: int, at: int, size: int) -> Fault | None:
        """The bound that a field breaks whose content begins at `at`; so far it has `count`."""
        name, limits = prefix + part.name, part.limits
        if part.is_list and count > limits.max_items:
            return too_many(name, count, part.field, limits)
        item = f"{name}[{count - 1}]" if part.is_list else name
        if part.shape is not None:
            return self.message(part.shape, at, at + size, f"{item}.")
        if part.is_text and size > limits.max_bytes:
            return wrong_size(item, size, limits)
        if part.is_map and size > _ENTRY_BYTES:
            text = f"has an entry of {size} bytes; the limit is {_ENTRY_BYTES}"
            return Fault(name, text, _ENTRY_BYTES)
        self.largest = max(self.largest, (size, name))
        return None

    def _items(self, part: _Part, at: int, size: int) -> int:
        """How many items of a field begin at `at`."""
        if not size or not part.is_list or part.is_text or part.is_map or part.shape:
            return 1
        # Packed: the last byte of each number is below 128. None has more than ten.
        if size > 10 * part.limits.max_items:
            return size // 10
        packed = np.frombuffer(self.content, np.uint8, size, at)
        return int(np.count_nonzero(packed < 128))

    def number(self, at: int) -> tuple[int, int]:
        """The number at `at`, and where it ends."""
        byte = self.content[at]
        if byte < 128:
            return byte, at + 1
        value, shift = byte & 127, 7
        while shift < 70:
            at += 1
            byte = self.content[at]
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at + 1
            shift += 7
        raise IndexError(at)
