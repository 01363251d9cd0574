"""The folder of a training run: its configuration, newest checkpoint and log."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
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
_EMBEDDINGS, _HEAD = "embed.weight", "head.weight"
PARTIAL = ".partial"
"""Ends the name of a file that is being written."""


class RunError(ValueError):
    """A run that cannot start as it is. The message says what to do."""


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
        for name in ("rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

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
class Origin:
    """Where a model comes from that was not trained here."""

    source: str
    architecture: str
    license: str
    """SPDX identifier, as the source writes it."""
    weights_sha256: str
    """Of the files that held the weights, one after the other."""
    begin_token: int | None = None
    """What its tokenizer puts before every text."""
    end_tokens: tuple[int, ...] = ()
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that its chat template has for them."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, with its configuration, data and metrics."""

    config: ModelConfig
    train: TrainConfig
    data: DatasetInfo
    step: int
    metrics: dict[str, float]
    model: Decoder
    origin: Origin | None = None
    """Set if the model was converted."""


def read_log(folder: Path) -> list[Progress]:
    """The steps of a run that evaluated, oldest first. A repeated step has its last result."""
    if not (folder / LOG).exists():
        return []
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
    if config.architecture.tied:
        weights[_HEAD] = weights[_EMBEDDINGS]
    model.load_state_dict(weights)
    model.eval()
    return Checkpoint(
        config,
        train_config,
        data,
        int(metadata["step"]),
        json.loads(metadata["metrics"]),
        model,
        read_origin(folder),
    )


def read_origin(folder: Path) -> Origin | None:
    """Where the model of a run was converted from; None if it was trained."""
    raw = json.loads((folder / CONFIG).read_text()).get("origin")
    return raw and Origin(**{**raw, "end_tokens": tuple(raw["end_tokens"])})


def _read_config(folder: Path) -> tuple[ModelConfig, TrainConfig, DatasetInfo]:
    """Configuration of a run; settings that did not exist when it started have their defaults."""
    raw = json.loads((folder / CONFIG).read_text())
    data = raw["data"]
    data["palette"] = tuple(tuple(colour) for colour in data["palette"])
    data["labels"] = tuple(data["labels"])
    return ModelConfig.read(raw["model"]), TrainConfig(**raw["train"]), DatasetInfo(**data)


def check_free(folder: Path, model: ModelConfig, train: TrainConfig, data: DatasetInfo) -> None:
    """Raises RunError if `folder` is in use, except by a run with this configuration.

    The configuration of a run that was killed before its first checkpoint binds nobody.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{folder} is a file: a run needs a folder; choose another name")
    if not (folder / CONFIG).exists():
        if any(folder.iterdir()):
            raise RunError(f"{folder} has files and no run: choose a new or an empty folder")
        return
    try:
        found = _read_config(folder)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RunError(
            f"{folder / CONFIG} is not the configuration of a run: choose another folder"
        ) from None
    if not (folder / CHECKPOINT).exists() or found == (model, train, data):
        return
    pairs = zip(_settings(*found), _settings(model, train, data), strict=True)
    changed = [
        f"{name} is {new!r}, there it is {old!r}" for (name, old), (_, new) in pairs if old != new
    ]
    raise RunError(
        f"{folder} has a run with another configuration ({'; '.join(changed)}): choose another "
        "folder, or use the settings in its config.json to continue that run"
    )


def _settings(
    model: ModelConfig, train: TrainConfig, data: DatasetInfo
) -> list[tuple[str, object]]:
    return [*asdict(model).items(), *asdict(train).items(), *asdict(data).items()]


@contextmanager
def claimed(
    folder: Path,
    model: ModelConfig,
    train: TrainConfig,
    data: DatasetInfo,
    origin: Mapping[str, str | int] | None = None,
) -> Iterator[None]:
    """The folder of a run, made if it does not exist.

    origin: what this run begins with; it is noted in the configuration.
    If an error comes before the first checkpoint, nothing of the run is left. Raises RunError if
    the folder is in use; see check_free.
    """
    check_free(folder, model, train, data)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / CHECKPOINT).exists():
            config = {"model": model.stored(), "train": asdict(train), "data": asdict(data)}
            if origin is not None:
                config["init"] = dict(origin)
            write_whole(folder / CONFIG, json.dumps(config, indent=1, allow_nan=False))
        yield
    except BaseException:
        if not (folder / CHECKPOINT).exists():
            for name in (CONFIG, LOG, CHECKPOINT + PARTIAL, CONFIG + PARTIAL):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has put something there
                for path in made:
                    path.rmdir()
        raise


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old content or the new one, whole."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    os.replace(partial, path)


def save(
    folder: Path,
    model: Decoder,
    optimisers: list[torch.optim.Optimizer],
    done: Progress,
    metrics: dict[str, float],
) -> None:
    """Replace the checkpoint of `folder` by one after the step `done`."""
    tied = model.config.architecture.tied
    tensors = {
        f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not (tied and name == _HEAD)
    }
    tensors.update(dict(_optimiser_tensors(optimisers)))
    partial = folder / (CHECKPOINT + PARTIAL)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        partial,
        {
            "step": str(done.step),
            "metrics": json.dumps(metrics, allow_nan=False),
            "progress": json.dumps(asdict(done), allow_nan=False),
        },
    )
    os.replace(partial, folder / CHECKPOINT)


def append_log(folder: Path, done: Progress) -> None:
    """Add a step that evaluated to the log."""
    with (folder / LOG).open("a") as log:
        log.write(json.dumps(asdict(done), allow_nan=False) + "\n")


def _optimiser_tensors(
    optimisers: list[torch.optim.Optimizer],
) -> Iterator[tuple[str, Tensor]]:
    for number, optimiser in enumerate(optimisers):
        for parameter, state in optimiser.state_dict()["state"].items():
            for name, tensor in state.items():
                yield f"optimiser.{number}.{parameter}.{name}", tensor


def restore(
    folder: Path, model: Decoder, optimisers: list[torch.optim.Optimizer]
) -> Progress | None:
    """Read the checkpoint of `folder`, and return its last step; None if there is no checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return None
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
        metadata = file.metadata()
    if model.config.architecture.tied:
        weights[_HEAD] = weights[_EMBEDDINGS]
    model.load_state_dict(weights)
    for optimiser, state in zip(optimisers, states, strict=True):
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    if "progress" in metadata:
        return Progress(**json.loads(metadata["progress"]))
    # From before checkpoints had it: each was of a step that is in the log.
    return next(done for done in read_log(folder) if done.step == int(metadata["step"]))
