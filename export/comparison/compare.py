"""Compares attention patterns: trains them on the same budget and computes the cost of a stream."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from concertina.bundle.resources import state_bytes, step_flops
from export.bundle import describe
from model.config import Attention, ModelConfig, Pooling
from model.data import Dataset
from model.initial import Initial
from model.memory import check_memory
from model.patterns import make_pattern
from model.run import (
    Checkpoint,
    Progress,
    RunError,
    TrainConfig,
    load_checkpoint,
    read_log,
)
from model.train import train

RESULTS = "results.json"
_SAMPLES = 200


@dataclass(frozen=True)
class Variant:
    """An attention pattern and its pooling, written `fixed` or `fixed:mean`."""

    attention: Attention
    pooling: Pooling = "max"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A variant from its text form. ModelConfig checks whether the pattern exists."""
        attention, _, pooling = text.partition(":")
        return cls(attention, pooling or "max")  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.attention if self.pooling == "max" else f"{self.attention}:{self.pooling}"


@dataclass(frozen=True)
class Entry:
    """A variant to compare, and the number of seeds to train it with, written `fixed@3`."""

    variant: Variant
    seeds: int = 1

    @classmethod
    def parse(cls, text: str) -> Entry:
        """An entry from its text form. Raises ValueError if the number of seeds is invalid."""
        variant, _, seeds = text.partition("@")
        if seeds and not (seeds.isdecimal() and int(seeds)):
            raise ValueError(f"{text}: the number of seeds after @ must be at least 1")
        return cls(Variant.parse(variant), int(seeds or 1))


@dataclass(frozen=True)
class Result:
    """One trained run, and the cost of one stream of its model."""

    variant: str
    seed: int
    bits: float
    """Bits per token on all held-out data."""
    seconds: float
    """Wall-clock time of all optimiser steps."""
    curve: tuple[tuple[float, float], ...]
    """Seconds of training and held-out bits at every evaluation; the last uses all data."""
    parameters: int
    tokens: tuple[int, ...]
    """Lengths of a stream, up to the context, for which the next two fields are computed."""
    state_bytes: tuple[int, ...]
    """Largest state, in bytes of float32, that a stream holds up to that length."""
    flops: tuple[float, ...]
    """Mean operations per token up to that length, folds included."""


def configure(base: ModelConfig, variant: Variant) -> ModelConfig:
    """`base` with another pattern and, except for rounding, the same number of weights.

    If a pattern has weights of its own, the MLP gets that many fewer. Raises ValueError if the
    pattern does not exist, does not fit `base`, or attends to later tokens.
    """
    config = dataclasses.replace(base, attention=variant.attention, pooling=variant.pooling)
    if config.masked:
        raise ValueError(
            f"{variant} predicts masked tokens: its bits cannot be compared with those of models "
            "that predict the next token"
        )
    own = sum(p.numel() for p in make_pattern(config).parameters())
    return dataclasses.replace(config, mlp=config.mlp - round(own / (2 * config.width)))


def run_folder(out: Path, variant: Variant, seed: int) -> Path:
    """Folder of a run; an existing run is resumed."""
    return out / f"{variant}-{seed}".replace(":", "-")


def compare(
    dataset: Dataset,
    base: ModelConfig,
    budget: TrainConfig,
    entries: Sequence[Entry],
    out: Path,
    on_step: Callable[[str, Progress], None] = lambda run, progress: None,
    stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[str, int], None] = lambda run, step: None,
) -> list[Result]:
    """Train every entry below `out`, and write `results.json` there after each run.

    Runs with the same seed get the same batches. `stop` is that of `train`, and `on_step` and
    `on_start` are, with the name of the run. Finished runs are only read. Raises ValueError for an
    entry that cannot be trained, before any training starts.
    """
    configs = {entry.variant: configure(base, entry.variant) for entry in entries}
    runs = [(entry.variant, seed) for entry in entries for seed in range(entry.seeds)]
    results: list[Result] = []
    for variant, seed in runs:
        folder, settings = run_folder(out, variant, seed), dataclasses.replace(budget, seed=seed)
        name = f"{variant}, seed {seed}"
        started = partial(_tell, on_start, name)
        train(
            *(folder, configs[variant], settings, dataset, partial(on_step, name)),
            on_start=started,
            stop=stop,
        )
        results.append(weigh(str(variant), seed, load_checkpoint(folder), read_log(folder)))
        text = json.dumps([asdict(result) for result in results], indent=1)
        (out / RESULTS).write_text(text + "\n")
    return results


def check_memories(
    base: ModelConfig, budget: TrainConfig, entries: Sequence[Entry], out: Path
) -> None:
    """Raises RunError, with the pattern, if memory is too small for a run that is not finished."""
    for entry in entries:
        folders = [run_folder(out, entry.variant, seed) for seed in range(entry.seeds)]
        if all(_is_finished(folder) for folder in folders):
            continue
        try:
            check_memory(configure(base, entry.variant), budget)
        except RunError as error:
            raise RunError(f"{entry.variant}: {error}") from None


def _is_finished(folder: Path) -> bool:
    log = read_log(folder)
    return bool(log) and log[-1].step == log[-1].steps


def _tell(
    on_start: Callable[[str, int], None], name: str, step: int, initial: Initial | None
) -> None:
    on_start(name, step)


def weigh(variant: str, seed: int, checkpoint: Checkpoint, log: Sequence[Progress]) -> Result:
    """Result of a run, with the resource model of the bundle that its export would give."""
    manifest = describe(checkpoint, variant, "1")
    context = checkpoint.config.context
    tokens = np.unique(np.geomspace(1, context, _SAMPLES).round().astype(np.int64))
    held = np.maximum.accumulate(state_bytes(manifest, np.arange(context)))  # before the last fold
    flops = np.cumsum([step_flops(manifest, position) for position in range(context)])
    return Result(
        variant,
        seed,
        bits=checkpoint.metrics[checkpoint.data.unit],
        seconds=log[-1].seconds,
        curve=tuple((p.seconds, p.heldout) for p in log if p.heldout is not None),
        parameters=manifest.parameters,
        tokens=tuple(tokens.tolist()),
        state_bytes=tuple(held[tokens - 1].tolist()),
        flops=tuple((flops[tokens - 1] / tokens).tolist()),
    )
