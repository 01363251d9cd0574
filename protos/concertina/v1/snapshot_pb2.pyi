import datetime

from concertina.v1 import generation_service_pb2 as _generation_service_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Snapshot(_message.Message):
    __slots__ = ("request", "outputs")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    request: _generation_service_pb2.GenerateRequest
    outputs: _containers.RepeatedCompositeFieldContainer[OutputSnapshot]
    def __init__(self, request: _Optional[_Union[_generation_service_pb2.GenerateRequest, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[OutputSnapshot, _Mapping]]] = ...) -> None: ...

class OutputSnapshot(_message.Message):
    __slots__ = ("output", "generated", "pushed", "state", "finished", "logprobs", "base_tokens", "base_characters", "queue_seconds", "first_token_seconds")
    class StateEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BASE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BASE_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    output: int
    generated: bytes
    pushed: int
    state: _containers.ScalarMap[str, bytes]
    finished: _generation_service_pb2.Finished
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_service_pb2.TokenLogprobs]
    base_tokens: int
    base_characters: int
    queue_seconds: float
    first_token_seconds: float
    def __init__(self, output: _Optional[int] = ..., generated: _Optional[bytes] = ..., pushed: _Optional[int] = ..., state: _Optional[_Mapping[str, bytes]] = ..., finished: _Optional[_Union[_generation_service_pb2.Finished, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_service_pb2.TokenLogprobs, _Mapping]]] = ..., base_tokens: _Optional[int] = ..., base_characters: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., first_token_seconds: _Optional[float] = ...) -> None: ...

class SnapshotHeader(_message.Message):
    __slots__ = ("version", "stream_id", "owner", "model", "fingerprint", "accepted", "expires", "keep_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    KEEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    stream_id: str
    owner: str
    model: str
    fingerprint: str
    accepted: _timestamp_pb2.Timestamp
    expires: _timestamp_pb2.Timestamp
    keep_seconds: float
    def __init__(self, version: _Optional[int] = ..., stream_id: _Optional[str] = ..., owner: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., accepted: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., keep_seconds: _Optional[float] = ...) -> None: ...
