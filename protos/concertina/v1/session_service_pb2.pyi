import datetime

from concertina.v1 import generation_service_pb2 as _generation_service_pb2
from concertina.v1 import limits_pb2 as _limits_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_PHASE_UNSPECIFIED: _ClassVar[SessionPhase]
    SESSION_PHASE_RUNNING: _ClassVar[SessionPhase]
    SESSION_PHASE_PAUSED: _ClassVar[SessionPhase]
    SESSION_PHASE_FINISHED: _ClassVar[SessionPhase]
    SESSION_PHASE_STORED: _ClassVar[SessionPhase]
SESSION_PHASE_UNSPECIFIED: SessionPhase
SESSION_PHASE_RUNNING: SessionPhase
SESSION_PHASE_PAUSED: SessionPhase
SESSION_PHASE_FINISHED: SessionPhase
SESSION_PHASE_STORED: SessionPhase

class Session(_message.Message):
    __slots__ = ("stream_id", "model", "phase", "outputs", "prompt_tokens", "generated_tokens", "state_bytes", "expires")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    model: str
    phase: SessionPhase
    outputs: int
    prompt_tokens: int
    generated_tokens: int
    state_bytes: int
    expires: _timestamp_pb2.Timestamp
    def __init__(self, stream_id: _Optional[str] = ..., model: _Optional[str] = ..., phase: _Optional[_Union[SessionPhase, str]] = ..., outputs: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., state_bytes: _Optional[int] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ContinueRequest(_message.Message):
    __slots__ = ("stream_id", "prompt", "stopping", "sampling")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    prompt: _generation_service_pb2.Prompt
    stopping: _generation_service_pb2.StoppingCriteria
    sampling: _generation_service_pb2.SamplingParameters
    def __init__(self, stream_id: _Optional[str] = ..., prompt: _Optional[_Union[_generation_service_pb2.Prompt, _Mapping]] = ..., stopping: _Optional[_Union[_generation_service_pb2.StoppingCriteria, _Mapping]] = ..., sampling: _Optional[_Union[_generation_service_pb2.SamplingParameters, _Mapping]] = ...) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("stream_id", "n")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    n: int
    def __init__(self, stream_id: _Optional[str] = ..., n: _Optional[int] = ...) -> None: ...

class ForkResponse(_message.Message):
    __slots__ = ("stream_ids",)
    STREAM_IDS_FIELD_NUMBER: _ClassVar[int]
    stream_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, stream_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("part", "sha256")
    PART_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    part: bytes
    sha256: bytes
    def __init__(self, part: _Optional[bytes] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class ImportRequest(_message.Message):
    __slots__ = ("part", "sha256")
    PART_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    part: bytes
    sha256: bytes
    def __init__(self, part: _Optional[bytes] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class ImportResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
