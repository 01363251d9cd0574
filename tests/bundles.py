"""Bundles small enough to be exported anew for every test session, from weights that matter."""

from __future__ import annotations

from pathlib import Path

from export.bundle import export_bundle
from model.config import ModelConfig
from model.data import DatasetInfo
from tests.checkpoints import write_checkpoint
from tests.once import one_at_a_time

TEXT_MODEL, IMAGE_MODEL = "tiny-text", "tiny-image"
LABELS = ("circle", "square", "star")
WIDTH = HEIGHT = 8
PALETTE = tuple((17 * k, 255 - 17 * k, 40 * (k % 4)) for k in range(16))
_SPAN = 8


def make_text_bundle(folder: Path, context: int = 96) -> Path:
    """A byte model with a context of 96 tokens and a span of 8, exported to `folder` once."""
    info = DatasetInfo("text", 256, source="random bytes", license="CC0-1.0")
    return _make(folder, TEXT_MODEL, info, context)


def make_image_bundle(folder: Path) -> Path:
    """A model of 8x8 pixels in 16 colours with three labels and a span of 8, in `folder`."""
    info = DatasetInfo(
        "image",
        len(PALETTE),
        source="random pixels",
        license="CC0-1.0",
        image_width=WIDTH,
        image_height=HEIGHT,
        palette=PALETTE,
        labels=LABELS,
    )
    return _make(folder, IMAGE_MODEL, info, context=WIDTH * HEIGHT)


def _make(folder: Path, name: str, info: DatasetInfo, context: int) -> Path:
    config = ModelConfig(
        info.vocabulary,
        context,
        width=32,
        layers=2,
        heads=2,
        mlp=64,
        span=_SPAN,
        starts=info.starts,
    )
    with one_at_a_time(folder):
        if not folder.exists():
            checkpoint = folder.with_name(folder.name + "-checkpoint")
            export_bundle(write_checkpoint(checkpoint, config, info), folder, name=name)
    return folder
