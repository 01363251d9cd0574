"""Windows of a dataset: what graphs are measured on, and what shows how far their caches reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from concertina.codecs.starts import TokenStarts
from concertina.codecs.tokenizer_codec import TokenizerCodec, tokenizer_codec
from concertina.codecs.tokenizer_file import TOKENIZER
from model.config import ModelConfig
from model.data import END_OF_TEXT, Dataset, Tokens, draw_batch, heldout_batches
from model.run import Origin

TOKENS = 1 << 16
"""Largest number of held-out tokens to measure: whole windows, spread evenly over the data."""
_CALIBRATED = 1 << 15
_BYTES = 256  # vocabulary of a dataset of text

_TEXT_TOKENS = 1 << 14
"""The same for pretrained models, which are larger by far."""
_TEXT_WINDOW = 1 << 10
_BYTES_OF_TOKEN, _LONGEST = 4, 16  # usual, and at most in the text that a window is cut from


@dataclass(frozen=True)
class Windows:
    """What a model is measured on."""

    heldout: Sequence[tuple[Tokens, Tokens]]
    """Inputs and targets, both `[1, T]`."""
    training: Sequence[Tokens]
    """Inputs `[1, T]`: those of `calibration_windows`."""
    size: int
    """Of all targets, in the unit of the loss: bytes of text, or pixels."""


def windows_of(dataset: Dataset, context: int) -> Windows:
    """Those of a model that was trained on such data.

    Raises ValueError if the data is shorter than one window.
    """
    heldout = [*heldout_batches(dataset, context, 1, max(1, TOKENS // context))]
    if not heldout:
        raise ValueError(f"the held-out data is shorter than one window of {context}")
    size = sum(targets.size for _, targets in heldout)
    return Windows(heldout, [*calibration_windows(dataset, context)], size)


def calibration_windows(dataset: Dataset, context: int) -> Iterable[Tokens]:
    """Inputs `[1, T]` for `cache_units`: of the training data, and one of random tokens.

    Training data, so that the loss is measured on data that the units have not seen. Random tokens,
    so that a prompt unlike the data does not go beyond the units either.
    """
    for step in range(max(1, _CALIBRATED // context)):
        yield draw_batch(dataset, context, 1, seed=0, step=step)[0]
    vocabulary = dataset.info.vocabulary
    tokens = np.random.default_rng(0).integers(vocabulary, size=(1, context))
    tokens[:, 0] = vocabulary
    yield tokens


def text_windows(dataset: Dataset, config: ModelConfig, origin: Origin, run: Path) -> Windows:
    """Those of the pretrained model in `run`, whose tokenizer takes text apart.

    Each begins as a stream does: with the begin token, if there is one. Without one the first token
    of a text is not predicted. Raises ValueError for data that is no text, or too little of it.
    """
    if (dataset.info.modality, dataset.info.vocabulary) != ("text", _BYTES):
        raise ValueError(
            f"the data is {dataset.info.modality} with vocabulary {dataset.info.vocabulary}: a "
            "pretrained model is measured on text; make a dataset with `concertina data text`"
        )
    if not (run / TOKENIZER).exists():
        raise ValueError(
            f"{run} has no {TOKENIZER}, so its model cannot be measured on text: convert a model "
            "that comes with one, or export without int8 and int4"
        )
    starts = TokenStarts(origin.source, config.vocabulary, origin.begin_token)
    codec = tokenizer_codec(starts, (run / TOKENIZER).read_bytes())
    window = min(config.context, _TEXT_WINDOW)
    heldout = [(row[:, :-1], row[:, 1:]) for row in _cut(dataset.heldout, codec, window)]
    if not heldout:
        raise ValueError("the held-out data has no text: use more data")
    size = sum(len(codec.text.bytes_of(targets[0].tolist())) for _, targets in heldout)
    training = [row[:, :-1] for row in _cut(dataset.train, codec, window)]
    random = np.random.default_rng(0).integers(config.vocabulary, size=(1, window))
    if origin.begin_token is not None:
        random[:, 0] = origin.begin_token
    return Windows(heldout, [*training, random], size)


def _cut(data: npt.NDArray[Any], codec: TokenizerCodec, window: int) -> Iterator[Tokens]:
    """Rows `[1, 1 + T]` of at most `window` inputs, from everywhere in the text; each of one
    document.
    """
    begin = codec.starts.begin
    most = max(1, len(data) // (_BYTES_OF_TOKEN * window))
    count = min(most, max(1, _TEXT_TOKENS // window))
    for first in np.linspace(0, len(data), count, endpoint=False).astype(int):
        content = data[first : first + _LONGEST * window].astype(np.uint8).tobytes()
        document = content.lstrip(bytes([END_OF_TEXT])).split(bytes([END_OF_TEXT]))[0]
        ids = codec.from_text(document.decode(errors="ignore"))
        if begin is not None:
            ids = np.concatenate(([begin], ids))
        if len(ids) > 1:
            yield ids[None, : 1 + window]
