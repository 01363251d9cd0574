"""Token datasets on disk, and the batches drawn from them.

A dataset is a folder with `dataset.json` (what a token means), `train.npy` and `heldout.npy`.
Text is a one-dimensional array of bytes in which each document ends with byte 0. Images are
`[image, 1 + pixels]`: the label (-1 for none), then one palette index per pixel in raster order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

_INFO = "dataset.json"
END_OF_TEXT = 0
"""The byte after each document: valid in UTF-8, but not used in text files."""
MASKED = 0.15
"""Share of the tokens that a masked model has to predict."""
IGNORED = -100
"""Target of positions without a target; `torch.nn.functional.cross_entropy` skips it."""


class DataError(ValueError):
    """Data that cannot be used as it is. The message says what to do."""


@dataclass(frozen=True)
class DatasetInfo:
    """What the tokens of a dataset mean. A copy goes into the bundle."""

    modality: Literal["text", "image"]
    vocabulary: int
    source: str
    license: str
    image_width: int = 0
    image_height: int = 0
    palette: tuple[tuple[int, int, int], ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def starts(self) -> int:
        """Number of start tokens: an unconditional one, and one per label."""
        return 1 + len(self.labels)

    @property
    def unit(self) -> str:
        """Unit of the loss in bits per token."""
        return "bits/byte" if self.modality == "text" else "bits/dim"


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory."""

    info: DatasetInfo
    train: npt.NDArray[Any]
    heldout: npt.NDArray[Any]


def save_dataset(folder: Path, dataset: Dataset) -> None:
    """Write `dataset` to `folder`, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    # dataset.json makes a dataset of a folder: it is there only while the rest is whole.
    (folder / _INFO).unlink(missing_ok=True)
    np.save(folder / "train.npy", dataset.train)
    np.save(folder / "heldout.npy", dataset.heldout)
    (folder / _INFO).write_text(json.dumps(asdict(dataset.info)) + "\n")


def check_free(folder: Path, modality: str, source: str) -> None:
    """Raises DataError if a dataset of `source` would replace anything but an older one of it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    way_out = "name a new folder, or delete it first"
    if not (folder / _INFO).is_file():
        raise DataError(f"{folder} exists and is not a dataset: {way_out}")
    held = load_dataset(folder).info
    if (held.modality, held.source) != (modality, source):
        raise DataError(
            f"{folder} holds a dataset of {held.modality} from {held.source}, which one of "
            f"{modality} from {source} would replace: {way_out}"
        )


def load_dataset(folder: Path) -> Dataset:
    """Read a dataset from `folder`. Raises FileNotFoundError if there is none."""
    if not (folder / _INFO).exists():
        raise FileNotFoundError(
            f"{folder} is not a dataset: {_INFO} is missing; make one with `concertina data`"
        )
    raw = json.loads((folder / _INFO).read_text())
    raw["palette"] = tuple(tuple(colour) for colour in raw["palette"])
    raw["labels"] = tuple(raw["labels"])
    return Dataset(
        DatasetInfo(**raw), np.load(folder / "train.npy"), np.load(folder / "heldout.npy")
    )


def draw_batch(
    dataset: Dataset, context: int, rows: int, seed: int, step: int
) -> tuple[Tokens, Tokens]:
    """Inputs and targets, both `[rows, T]`, as a pure function of (dataset, seed, step).

    Inputs are a start token followed by the targets without the last one. Half of the text windows
    begin at the start of a document; a tenth of the images lose their label. Raises ValueError if
    the text is shorter than a window.
    """
    rng = np.random.default_rng((seed, step))
    if dataset.info.modality == "image":
        images = dataset.train[rng.integers(len(dataset.train), size=rows)].astype(np.int64)
        images[rng.random(rows) < 0.1, 0] = -1
        return shift_images(images, dataset.info.vocabulary)
    last = len(dataset.train) - context
    if last < 0:
        raise ValueError(
            f"{len(dataset.train)} training tokens are fewer than one window of {context}: "
            "use a shorter context or more data"
        )
    starts = rng.integers(last + 1, size=rows)
    documents = np.concatenate(([0], np.flatnonzero(dataset.train == END_OF_TEXT) + 1))
    documents = documents[documents <= last]
    whole = rng.random(rows) < 0.5
    starts[whole] = rng.choice(documents, size=int(whole.sum()))
    windows = np.stack([dataset.train[start : start + context] for start in starts])
    return shift_text(windows.astype(np.int64), dataset.info.vocabulary)


def heldout_batches(
    dataset: Dataset, context: int, rows: int, limit: int | None = None
) -> Iterator[tuple[Tokens, Tokens]]:
    """The held-out data in order and without overlap, at most `limit` rows of it."""
    held = dataset.heldout
    if dataset.info.modality == "text":
        held = held[: len(held) // context * context].reshape(-1, context)
    if limit is not None:  # rows spread evenly over the data, to represent all of it
        held = held[np.linspace(0, len(held) - 1, min(limit, len(held))).astype(int)]
    shift = shift_text if dataset.info.modality == "text" else shift_images
    for first in range(0, len(held), rows):
        yield shift(held[first : first + rows].astype(np.int64), dataset.info.vocabulary)


def mask(targets: Tokens, vocabulary: int, seed: tuple[int, ...]) -> tuple[Tokens, Tokens]:
    """Inputs and targets of a masked model: the start token replaces `MASKED` of the tokens.

    Targets of the other tokens are `IGNORED`. A pure function of (targets, seed).
    """
    hidden = np.random.default_rng(seed).random(targets.shape) < MASKED
    hidden[:, 0] |= ~hidden.any(axis=1)
    return np.where(hidden, vocabulary, targets), np.where(hidden, targets, IGNORED)


def shift_text(windows: Tokens, vocabulary: int) -> tuple[Tokens, Tokens]:
    """Inputs and targets for windows `[rows, T]` of bytes; inputs begin with the start token."""
    start = np.full((len(windows), 1), vocabulary, np.int64)
    return np.concatenate((start, windows[:, :-1]), axis=1), windows


def shift_images(images: Tokens, vocabulary: int) -> tuple[Tokens, Tokens]:
    """Inputs and targets for `[rows, 1 + pixels]`; inputs begin with the label's start token."""
    start = vocabulary + 1 + images[:, :1]
    return np.concatenate((start, images[:, 1:-1]), axis=1), images[:, 1:]
