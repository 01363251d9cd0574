from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor
LIMITS_FIELD_NUMBER: _ClassVar[int]
limits: _descriptor.FieldDescriptor
LARGEST_BYTES_FIELD_NUMBER: _ClassVar[int]
largest_bytes: _descriptor.FieldDescriptor

class Limits(_message.Message):
    __slots__ = ("min", "above", "max", "max_items", "min_bytes", "max_bytes", "any", "also")
    MIN_FIELD_NUMBER: _ClassVar[int]
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_FIELD_NUMBER: _ClassVar[int]
    MIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    ANY_FIELD_NUMBER: _ClassVar[int]
    ALSO_FIELD_NUMBER: _ClassVar[int]
    min: float
    above: float
    max: float
    max_items: int
    min_bytes: int
    max_bytes: int
    any: bool
    also: str
    def __init__(self, min: _Optional[float] = ..., above: _Optional[float] = ..., max: _Optional[float] = ..., max_items: _Optional[int] = ..., min_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ..., any: _Optional[bool] = ..., also: _Optional[str] = ...) -> None: ...
