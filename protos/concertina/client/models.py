"""The models of a server, and the scores that they give to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from concertina.client.layout import Fold, StateTensor, fold_of, tensors_of
from concertina.v1 import bundle_pb2, generation_service_pb2, model_service_pb2


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """Size of an image in pixels, and its palette: three bytes of colour per index."""

    width: int
    height: int
    palette: bytes


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served.

    modality: `text` or `image`.
    vocabulary: the model predicts ids below this number.
    context: most tokens of one stream, with its prompt.
    slots: streams that decode at the same time; `queue_limit` more may wait.
    max_state_bytes: size of one stream's state at its largest.
    metrics: measured on held-out data in training, for example `bits/byte`.
    weights: how matrices are stored: `float32`, `bfloat16`, `float16`, `int8` or `int4`.
    weights_loss: bits per held-out byte or pixel that `int8` or `int4` costs.
    state: how keys and values of streams are kept: `float32`, `float16` or `int8`.
    state_loss: bits per held-out byte or pixel that `int8` costs compared with `float32`.
    has_tokenizer: whether tokens are pieces of text, which `tokenize` gives, and not its bytes.
    begin_token: the token that stands before every prompt; None if it is no id, or there is none.
    tensors: what the state of a stream is made of. fold: when it folds; None if it never does.
    """

    name: str
    version: str
    fingerprint: str
    modality: str
    vocabulary: int
    labels: tuple[str, ...]
    context: int
    image: ImageFormat | None
    attention: str
    parameters: int
    metrics: dict[str, float]
    weights: str
    weights_loss: float
    state: str
    state_loss: float
    slots: int
    queue_limit: int
    max_state_bytes: int
    has_tokenizer: bool = False
    begin_token: int | None = None
    tensors: tuple[StateTensor, ...] = ()
    fold: Fold | None = None

    @property
    def counts_first_token(self) -> bool:
        """Whether the first token of a prompt is predicted and counted, as the others are."""
        return not self.has_tokenizer or self.begin_token is not None


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts given tokens: the bits of each, and their mean."""

    model: str
    fingerprint: str
    bits_per_token: float
    bits: tuple[float, ...]
    text_bytes: int | None = None
    """Bytes of text that the tokens are; None if they are no text."""

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for each byte of text, whatever the tokens are; None if they are no text."""
        return len(self.bits) * self.bits_per_token / self.text_bytes if self.text_bytes else None


@dataclass(frozen=True, slots=True)
class TokenList:
    """Tokens of a model, and what each is: bytes of text, maybe a part of a character.

    text, rgb: their text, or colours if they are pixels; only from `detokenize`.
    """

    model: str
    fingerprint: str
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    text: str = ""
    rgb: bytes = b""


def token_list(
    response: model_service_pb2.TokenizeResponse | model_service_pb2.DetokenizeResponse,
    ids: Sequence[int],
) -> TokenList:
    """The tokens `ids`, of which a response tells."""
    made = TokenList(response.model, response.fingerprint, tuple(ids), tuple(response.pieces))
    if isinstance(response, model_service_pb2.DetokenizeResponse):
        return replace(made, text=response.text, rgb=response.rgb)
    return made


def score_from(response: generation_service_pb2.ScoreResponse) -> Score:
    """The score in a response."""
    return Score(
        model=response.model,
        fingerprint=response.fingerprint,
        bits_per_token=response.bits_per_token,
        bits=tuple(response.bits),
        text_bytes=response.text_bytes if response.HasField("text_bytes") else None,
    )


def model_from(model: model_service_pb2.Model) -> Model:
    """The model in a response."""
    manifest, quantisation = model.manifest, model.manifest.quantisation
    tokenizer = manifest.tokenizer
    of_state, image = manifest.state_quantisation, None
    if manifest.HasField("image"):
        image = ImageFormat(manifest.image.width, manifest.image.height, manifest.image.palette)
    return Model(
        name=manifest.name,
        version=manifest.version,
        fingerprint=manifest.fingerprint,
        modality=bundle_pb2.Modality.Name(manifest.modality).removeprefix("MODALITY_").lower(),
        vocabulary=manifest.vocabulary,
        labels=tuple(manifest.labels),
        context=manifest.context,
        image=image,
        attention=manifest.attention,
        parameters=manifest.parameters,
        metrics=dict(manifest.metrics),
        weights=f"int{quantisation.bits}" if quantisation.bits else _weights_type(manifest),
        weights_loss=quantisation.heldout - quantisation.heldout_float16,
        state=_state_type(manifest),
        state_loss=of_state.heldout - of_state.heldout_float32,
        slots=model.slots,
        queue_limit=model.queue_limit,
        max_state_bytes=model.max_state_bytes,
        has_tokenizer=manifest.HasField("tokenizer"),
        begin_token=tokenizer.begin_token if tokenizer.HasField("begin_token") else None,
        tensors=tensors_of(manifest),
        fold=fold_of(manifest),
    )


def _weights_type(manifest: bundle_pb2.Manifest) -> str:
    """Name of the type of matrices that are not quantised."""
    return _type_name(manifest.weights or bundle_pb2.DATA_TYPE_FLOAT16)


def _state_type(manifest: bundle_pb2.Manifest) -> str:
    """Name of the smallest type in the state: the caches may be smaller than the rest of it."""
    types = {tensor.data_type for tensor in manifest.state}
    small = (bundle_pb2.DATA_TYPE_INT8, bundle_pb2.DATA_TYPE_FLOAT16)
    found = next((kind for kind in small if kind in types), bundle_pb2.DATA_TYPE_FLOAT32)
    return _type_name(found)


def _type_name(kind: bundle_pb2.DataType) -> str:
    return bundle_pb2.DataType.Name(kind).removeprefix("DATA_TYPE_").lower()
