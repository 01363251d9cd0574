import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Snapshot(_message.Message):
    __slots__ = ("outputs", "request", "prompt_epoch", "prompt_digest")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[OutputSnapshot]
    request: StoredRequest
    prompt_epoch: int
    prompt_digest: bytes
    def __init__(self, outputs: _Optional[_Iterable[_Union[OutputSnapshot, _Mapping]]] = ..., request: _Optional[_Union[StoredRequest, _Mapping]] = ..., prompt_epoch: _Optional[int] = ..., prompt_digest: _Optional[bytes] = ...) -> None: ...

class StoredRequest(_message.Message):
    __slots__ = ("outputs", "start_token", "prompt", "sampling", "max_tokens", "min_tokens", "stop", "stop_tokens", "include_stop", "end_token", "time_limit_seconds", "complete_at", "prompt_logprobs", "stream_interval", "priority", "more_end_tokens")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    START_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TIME_LIMIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_AT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STREAM_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MORE_END_TOKENS_FIELD_NUMBER: _ClassVar[int]
    outputs: int
    start_token: int
    prompt: bytes
    sampling: StoredSampling
    max_tokens: int
    min_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_tokens: _containers.RepeatedScalarFieldContainer[int]
    include_stop: bool
    end_token: int
    time_limit_seconds: float
    complete_at: int
    prompt_logprobs: int
    stream_interval: int
    priority: int
    more_end_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, outputs: _Optional[int] = ..., start_token: _Optional[int] = ..., prompt: _Optional[bytes] = ..., sampling: _Optional[_Union[StoredSampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_tokens: _Optional[_Iterable[int]] = ..., include_stop: _Optional[bool] = ..., end_token: _Optional[int] = ..., time_limit_seconds: _Optional[float] = ..., complete_at: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., stream_interval: _Optional[int] = ..., priority: _Optional[int] = ..., more_end_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class StoredSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "typical_p", "logprobs", "processors", "grammar")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROCESSORS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    typical_p: float
    logprobs: int
    processors: StoredProcessors
    grammar: StoredGrammar
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., typical_p: _Optional[float] = ..., logprobs: _Optional[int] = ..., processors: _Optional[_Union[StoredProcessors, _Mapping]] = ..., grammar: _Optional[_Union[StoredGrammar, _Mapping]] = ...) -> None: ...

class StoredGrammar(_message.Message):
    __slots__ = ("kind", "texts")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, kind: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ...) -> None: ...

class StoredProcessors(_message.Message):
    __slots__ = ("bias", "allowed", "bad_words", "min_tokens", "withheld", "repetition_penalty", "frequency_penalty", "presence_penalty", "bad_bytes")
    class BiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WITHHELD_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    bias: _containers.ScalarMap[int, float]
    allowed: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[StoredWord]
    min_tokens: int
    withheld: _containers.RepeatedScalarFieldContainer[int]
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    bad_bytes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, bias: _Optional[_Mapping[int, float]] = ..., allowed: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[StoredWord, _Mapping]]] = ..., min_tokens: _Optional[int] = ..., withheld: _Optional[_Iterable[int]] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., bad_bytes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StoredWord(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class AdoptedTokens(_message.Message):
    __slots__ = ("epoch", "end")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    end: int
    def __init__(self, epoch: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class OutputSnapshot(_message.Message):
    __slots__ = ("output", "generated", "pushed", "state", "base_tokens", "base_characters", "queue_seconds", "first_token_seconds", "finish", "logprobs", "first", "adopted", "state_epoch", "tokens")
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
    BASE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BASE_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    STATE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    output: int
    generated: bytes
    pushed: int
    state: _containers.ScalarMap[str, bytes]
    base_tokens: int
    base_characters: int
    queue_seconds: float
    first_token_seconds: float
    finish: StoredFinish
    logprobs: _containers.RepeatedCompositeFieldContainer[StoredLogprobs]
    first: int
    adopted: _containers.RepeatedCompositeFieldContainer[AdoptedTokens]
    state_epoch: int
    tokens: int
    def __init__(self, output: _Optional[int] = ..., generated: _Optional[bytes] = ..., pushed: _Optional[int] = ..., state: _Optional[_Mapping[str, bytes]] = ..., base_tokens: _Optional[int] = ..., base_characters: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., first_token_seconds: _Optional[float] = ..., finish: _Optional[_Union[StoredFinish, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[StoredLogprobs, _Mapping]]] = ..., first: _Optional[int] = ..., adopted: _Optional[_Iterable[_Union[AdoptedTokens, _Mapping]]] = ..., state_epoch: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class StoredFinish(_message.Message):
    __slots__ = ("reason", "stop", "generated", "queue_seconds", "first_token_seconds", "total_seconds", "state_bytes")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    reason: str
    stop: str
    generated: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    state_bytes: int
    def __init__(self, reason: _Optional[str] = ..., stop: _Optional[str] = ..., generated: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., first_token_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ..., state_bytes: _Optional[int] = ...) -> None: ...

class StoredLogprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class SnapshotHeader(_message.Message):
    __slots__ = ("version", "stream_id", "owner", "model", "fingerprint", "accepted", "expires", "keep_seconds", "name")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    KEEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    version: int
    stream_id: str
    owner: str
    model: str
    fingerprint: str
    accepted: _timestamp_pb2.Timestamp
    expires: _timestamp_pb2.Timestamp
    keep_seconds: float
    name: str
    def __init__(self, version: _Optional[int] = ..., stream_id: _Optional[str] = ..., owner: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., accepted: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., keep_seconds: _Optional[float] = ..., name: _Optional[str] = ...) -> None: ...
