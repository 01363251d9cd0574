from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Modality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODALITY_UNSPECIFIED: _ClassVar[Modality]
    MODALITY_TEXT: _ClassVar[Modality]
    MODALITY_IMAGE: _ClassVar[Modality]

class StateKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_KIND_UNSPECIFIED: _ClassVar[StateKind]
    STATE_KIND_STACK: _ClassVar[StateKind]
    STATE_KIND_RECURRENT: _ClassVar[StateKind]
    STATE_KIND_HISTORY: _ClassVar[StateKind]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_INT8: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
MODALITY_UNSPECIFIED: Modality
MODALITY_TEXT: Modality
MODALITY_IMAGE: Modality
STATE_KIND_UNSPECIFIED: StateKind
STATE_KIND_STACK: StateKind
STATE_KIND_RECURRENT: StateKind
STATE_KIND_HISTORY: StateKind
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_INT8: DataType
DATA_TYPE_BFLOAT16: DataType

class Manifest(_message.Message):
    __slots__ = ("format", "name", "version", "fingerprint", "modality", "vocabulary", "labels", "end_token", "context", "image", "state", "fold", "files", "metrics", "training_data", "parity", "parameters", "attention", "cost", "quantisation", "state_quantisation", "tokenizer", "weights")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODALITY_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FOLD_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_DATA_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    STATE_QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    format: int
    name: str
    version: str
    fingerprint: str
    modality: Modality
    vocabulary: int
    labels: _containers.RepeatedScalarFieldContainer[str]
    end_token: int
    context: int
    image: ImageFormat
    state: _containers.RepeatedCompositeFieldContainer[StateTensor]
    fold: FoldSchedule
    files: _containers.RepeatedCompositeFieldContainer[BundleFile]
    metrics: _containers.ScalarMap[str, float]
    training_data: TrainingData
    parity: Parity
    parameters: int
    attention: str
    cost: Cost
    quantisation: Quantisation
    state_quantisation: StateQuantisation
    tokenizer: Tokenizer
    weights: DataType
    def __init__(self, format: _Optional[int] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., modality: _Optional[_Union[Modality, str]] = ..., vocabulary: _Optional[int] = ..., labels: _Optional[_Iterable[str]] = ..., end_token: _Optional[int] = ..., context: _Optional[int] = ..., image: _Optional[_Union[ImageFormat, _Mapping]] = ..., state: _Optional[_Iterable[_Union[StateTensor, _Mapping]]] = ..., fold: _Optional[_Union[FoldSchedule, _Mapping]] = ..., files: _Optional[_Iterable[_Union[BundleFile, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., training_data: _Optional[_Union[TrainingData, _Mapping]] = ..., parity: _Optional[_Union[Parity, _Mapping]] = ..., parameters: _Optional[int] = ..., attention: _Optional[str] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., quantisation: _Optional[_Union[Quantisation, _Mapping]] = ..., state_quantisation: _Optional[_Union[StateQuantisation, _Mapping]] = ..., tokenizer: _Optional[_Union[Tokenizer, _Mapping]] = ..., weights: _Optional[_Union[DataType, str]] = ...) -> None: ...

class Tokenizer(_message.Message):
    __slots__ = ("begin_token", "end_tokens", "template_tokens")
    class TemplateTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BEGIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    begin_token: int
    end_tokens: _containers.RepeatedScalarFieldContainer[int]
    template_tokens: _containers.ScalarMap[str, str]
    def __init__(self, begin_token: _Optional[int] = ..., end_tokens: _Optional[_Iterable[int]] = ..., template_tokens: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ImageFormat(_message.Message):
    __slots__ = ("width", "height", "palette")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    PALETTE_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    palette: bytes
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., palette: _Optional[bytes] = ...) -> None: ...

class StateTensor(_message.Message):
    __slots__ = ("name", "kind", "shape", "data_type", "initial", "kept")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: StateKind
    shape: _containers.RepeatedScalarFieldContainer[int]
    data_type: DataType
    initial: float
    kept: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[StateKind, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data_type: _Optional[_Union[DataType, str]] = ..., initial: _Optional[float] = ..., kept: _Optional[int] = ...) -> None: ...

class FoldSchedule(_message.Message):
    __slots__ = ("span", "binary", "resets", "keep_first", "keep_newest")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    BINARY_FIELD_NUMBER: _ClassVar[int]
    RESETS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIRST_FIELD_NUMBER: _ClassVar[int]
    KEEP_NEWEST_FIELD_NUMBER: _ClassVar[int]
    span: int
    binary: bool
    resets: bool
    keep_first: int
    keep_newest: int
    def __init__(self, span: _Optional[int] = ..., binary: _Optional[bool] = ..., resets: _Optional[bool] = ..., keep_first: _Optional[int] = ..., keep_newest: _Optional[int] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("step", "step_entry", "fold", "fold_entry", "fold_row")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_ENTRY_FIELD_NUMBER: _ClassVar[int]
    FOLD_FIELD_NUMBER: _ClassVar[int]
    FOLD_ENTRY_FIELD_NUMBER: _ClassVar[int]
    FOLD_ROW_FIELD_NUMBER: _ClassVar[int]
    step: int
    step_entry: int
    fold: int
    fold_entry: int
    fold_row: int
    def __init__(self, step: _Optional[int] = ..., step_entry: _Optional[int] = ..., fold: _Optional[int] = ..., fold_entry: _Optional[int] = ..., fold_row: _Optional[int] = ...) -> None: ...

class BundleFile(_message.Message):
    __slots__ = ("path", "sha256", "bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    sha256: str
    bytes: int
    def __init__(self, path: _Optional[str] = ..., sha256: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class TrainingData(_message.Message):
    __slots__ = ("source", "license", "tokens")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    source: str
    license: str
    tokens: int
    def __init__(self, source: _Optional[str] = ..., license: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class Quantisation(_message.Message):
    __slots__ = ("bits", "block", "heldout", "heldout_float16", "tokens", "rounded_parity")
    BITS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HELDOUT_FIELD_NUMBER: _ClassVar[int]
    HELDOUT_FLOAT16_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUNDED_PARITY_FIELD_NUMBER: _ClassVar[int]
    bits: int
    block: int
    heldout: float
    heldout_float16: float
    tokens: int
    rounded_parity: Parity
    def __init__(self, bits: _Optional[int] = ..., block: _Optional[int] = ..., heldout: _Optional[float] = ..., heldout_float16: _Optional[float] = ..., tokens: _Optional[int] = ..., rounded_parity: _Optional[_Union[Parity, _Mapping]] = ...) -> None: ...

class StateQuantisation(_message.Message):
    __slots__ = ("heldout", "heldout_float32", "tokens", "parity")
    HELDOUT_FIELD_NUMBER: _ClassVar[int]
    HELDOUT_FLOAT32_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    heldout: float
    heldout_float32: float
    tokens: int
    parity: Parity
    def __init__(self, heldout: _Optional[float] = ..., heldout_float32: _Optional[float] = ..., tokens: _Optional[int] = ..., parity: _Optional[_Union[Parity, _Mapping]] = ...) -> None: ...

class Parity(_message.Message):
    __slots__ = ("max_error", "tolerance", "positions")
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    max_error: float
    tolerance: float
    positions: int
    def __init__(self, max_error: _Optional[float] = ..., tolerance: _Optional[float] = ..., positions: _Optional[int] = ...) -> None: ...
