"""The folder of a training run: its configuration, newest checkpoint and log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. `rate` is the peak of a warm-up and cosine decay schedule."""

    tokens: int = 10_000_000
    rows: int = 8
    rate: float = 0.01
    warmup: int = 100
    clip: float = 1.0
    weight_decay: float = 0.3
    dropout: float = 0.0
    seed: int = 0
    bfloat16: bool = True
    evaluate_every: int = 250
    evaluate_rows: int = 16

    def __post_init__(self) -> None:
        for name in ("tokens", "rows", "warmup", "evaluate_every", "evaluate_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def steps(self, context: int) -> int:
        """Number of optimiser steps for `tokens` tokens in windows of `context`."""
        return max(1, self.tokens // (self.rows * context))


@dataclass(frozen=True)
class Progress:
    """Result of one optimiser step. `heldout` is set on steps that evaluate."""

    step: int
    steps: int
    bits: float
    tokens_per_second: float
    heldout: float | None
    seconds: float
    """Time of all optimiser steps so far, without evaluations, including interrupted runs."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, with its configuration, data and metrics."""

    config: ModelConfig
    train: TrainConfig
    data: DatasetInfo
    step: int
    metrics: dict[str, float]
    model: Decoder


def read_log(folder: Path) -> list[Progress]:
    """The steps of a run that evaluated, oldest first. A repeated step has its last result."""
    lines = (folder / LOG).read_text().splitlines()
    steps = {line["step"]: line for line in ({"seconds": 0.0, **json.loads(x)} for x in lines)}
    return [Progress(**steps[step]) for step in sorted(steps)]


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the newest checkpoint of `folder`. Raises FileNotFoundError if there is none."""
    if not (folder / CHECKPOINT).exists():
        raise FileNotFoundError(f"{folder} has no {CHECKPOINT}: run `concertina train` first")
    config, train_config, data = _read_config(folder)
    model = Decoder(config)
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        metadata = file.metadata()
        weights = {
            name.removeprefix("model."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - not a dict
            if name.startswith("model.")
        }
    model.load_state_dict(weights)
    model.eval()
    return Checkpoint(
        config,
        train_config,
        data,
        int(metadata["step"]),
        json.loads(metadata["metrics"]),
        model,
    )


def _read_config(folder: Path) -> tuple[ModelConfig, TrainConfig, DatasetInfo]:
    """Configuration of a run; settings that did not exist when it started have their defaults."""
    raw = json.loads((folder / CONFIG).read_text())
    data = raw["data"]
    data["palette"] = tuple(tuple(colour) for colour in data["palette"])
    data["labels"] = tuple(data["labels"])
    return ModelConfig(**raw["model"]), TrainConfig(**raw["train"]), DatasetInfo(**data)


def claim(folder: Path, model: ModelConfig, train: TrainConfig, data: DatasetInfo) -> None:
    text = json.dumps(
        {"model": asdict(model), "train": asdict(train), "data": asdict(data)}, indent=1
    )
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG).exists() and _read_config(folder) != (model, train, data):
        raise ValueError(
            f"{folder} has a run with another configuration: choose another folder, or use the "
            "settings in its config.json to continue that run"
        )
    (folder / CONFIG).write_text(text)


def save(
    folder: Path,
    model: Decoder,
    optimisers: list[torch.optim.Optimizer],
    step: int,
    metrics: dict[str, float],
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors.update(dict(_optimiser_tensors(optimisers)))
    partial = folder / (CHECKPOINT + ".partial")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        partial,
        {"step": str(step), "metrics": json.dumps(metrics)},
    )
    os.replace(partial, folder / CHECKPOINT)


def _optimiser_tensors(
    optimisers: list[torch.optim.Optimizer],
) -> Iterator[tuple[str, Tensor]]:
    for number, optimiser in enumerate(optimisers):
        for parameter, state in optimiser.state_dict()["state"].items():
            for name, tensor in state.items():
                yield f"optimiser.{number}.{parameter}.{name}", tensor


def restore(folder: Path, model: Decoder, optimisers: list[torch.optim.Optimizer]) -> int:
    weights: dict[str, Tensor] = {}
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimisers]
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            kind, _, rest = name.partition(".")
            if kind == "model":
                weights[rest] = file.get_tensor(name)
            else:
                number, parameter, field = rest.split(".")
                states[int(number)].setdefault(int(parameter), {})[field] = file.get_tensor(name)
        step = int(file.metadata()["step"])
    model.load_state_dict(weights)
    for optimiser, state in zip(optimisers, states, strict=True):
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return step
