"""What has to fit before a run starts: the model, the data, the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from model.config import ROWS, ModelConfig
from model.data import Dataset, DatasetInfo
from model.decoder import Decoder
from model.run import RunError


def check_fit(model: ModelConfig, dataset: Dataset) -> None:
    """Raises RunError if `model` cannot be trained on `dataset`, or not evaluated on it."""
    _check_settings(model, dataset.info)
    for part, tokens in (("training", dataset.train), ("held-out", dataset.heldout)):
        if dataset.info.modality == "image":
            if not len(tokens):
                raise RunError(f"the {part} data has no images: make it of more images")
            marks, pixels = tokens[:, 0], tokens[:, 1:]
            if marks.max() >= len(dataset.info.labels) or marks.min() < -1:
                raise RunError(
                    f"the {part} data has labels from {marks.min()} to {marks.max()}, but "
                    f"{len(dataset.info.labels)} are named: make the data again"
                )
        else:
            pixels = tokens
            if len(tokens) < model.context:
                raise RunError(
                    f"the {part} data has {len(tokens):,} tokens, fewer than one window of "
                    f"{model.context:,}: use a context of at most that, or more data"
                    + (" or a larger --heldout of `concertina data`" if part == "held-out" else "")
                )
        if pixels.max() >= model.vocabulary or pixels.min() < 0:
            raise RunError(
                f"the {part} data has tokens from {pixels.min()} to {pixels.max()}, but the "
                f"vocabulary is {model.vocabulary}: make the data again"
            )


def check_room(folder: Path, model: Decoder) -> None:
    """Raises RunError if the disk of `folder` cannot hold a checkpoint beside the one before."""
    # Weights and at most two moments in float32; the old one stays until the new one is whole.
    needed = 2 * 3 * 4 * sum(weight.numel() for weight in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, and two checkpoints take "
            f"{needed / 1e6:,.0f} MB: free some, or choose a folder on another disk"
        )


def _check_settings(model: ModelConfig, data: DatasetInfo) -> None:
    if data.modality == "image" and model.attention in ROWS and model.span != data.image_width:
        raise RunError(
            f"{model.attention} has rows of {model.span} tokens, but the images have rows of "
            f"{data.image_width} pixels: set the span to the width of the images"
        )
    wanted = {"vocabulary": data.vocabulary, "starts": data.starts}
    if data.modality == "image":
        wanted["context"] = data.image_width * data.image_height
    for name, value in wanted.items():
        if getattr(model, name) != value:
            raise RunError(
                f"the model's {name} is {getattr(model, name)}, but this data needs {value}"
            )
