"""Bundles small enough to be exported anew for every test session, from weights that matter.

A fresh decoder adds nothing to its residual stream, so whatever attention does would go unseen:
every weight here is random, and large enough that each token of the past moves the logits.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from export.bundle import export_bundle
from model.config import ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder
from model.train import CHECKPOINT, CONFIG, TrainConfig

TEXT_MODEL, IMAGE_MODEL = "tiny-text", "tiny-image"
LABELS = ("circle", "square", "star")
WIDTH = HEIGHT = 8
PALETTE = tuple((17 * k, 255 - 17 * k, 40 * (k % 4)) for k in range(16))
_SPAN = 8


def make_text_bundle(folder: Path) -> Path:
    """A byte model with a context of 96 tokens and a span of 8, exported to `folder`."""
    info = DatasetInfo("text", 256, source="random bytes", license="CC0-1.0")
    return _make(folder, TEXT_MODEL, info, context=96)


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
    checkpoint = folder.with_name(folder.name + "-checkpoint")
    checkpoint.mkdir(parents=True)
    weights = {f"model.{key}": value for key, value in _random(config).state_dict().items()}
    metrics = {info.unit: 8.0, "tokens": 1.0}
    save_file(weights, checkpoint / CHECKPOINT, {"step": "1", "metrics": json.dumps(metrics)})
    settings = {"model": asdict(config), "train": asdict(TrainConfig()), "data": asdict(info)}
    (checkpoint / CONFIG).write_text(json.dumps(settings))
    export_bundle(checkpoint, folder, name=name)
    return folder


def _random(config: ModelConfig) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Decoder(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight) * 0.1)
                elif name.startswith(("embed", "positions")):
                    weight.normal_()
                else:
                    weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    return model
