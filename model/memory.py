"""The memory that training takes, estimated before it starts, and the memory that there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from concertina.machine import cgroups
from model.config import ModelConfig
from model.decoder import Decoder
from model.run import RunError, TrainConfig

_RESIDENT = 1.9
"""Resident bytes for one byte that is kept: buffers of operations, and what malloc holds back.
Measured: 1.6 to 2.2, depending on pattern and type."""
_EVALUATED_ROWS = 8


@dataclass(frozen=True)
class Estimate:
    """Bytes that training adds to the process."""

    fixed: int
    """Weights, gradients, optimiser, and copies of weights in bfloat16."""
    row: int
    """Activations of one window."""
    rows: int
    evaluation: int
    """Activations of an evaluation, which comes between two steps."""

    @property
    def total(self) -> int:
        """The most at one time."""
        return self.fixed + max(self.rows * self.row, self.evaluation)


def check_memory(model: ModelConfig, train: TrainConfig, free: int | None = None) -> Estimate:
    """The estimate of a run. Raises RunError if it is above `free`, by default what there is."""
    free = available() if free is None else free
    found = estimate(model, train)
    if found.total <= free:
        return found
    rows = (free - found.fixed) // found.row if found.fixed + found.evaluation <= free else 0
    fix = f"--rows {rows}" if rows >= 1 else "a shorter --context or a smaller --width"
    raise RunError(
        f"training needs about {_gb(found.total)} of memory ({_gb(found.fixed)} for weights and "
        f"optimiser, {_gb(found.total - found.fixed)} for {train.rows} windows of "
        f"{model.context:,} tokens), and {_gb(free)} are free: use {fix}, or --force to try"
    )


def estimate(model: ModelConfig, train: TrainConfig) -> Estimate:
    """What a run takes. Computes no numbers: it follows shapes and types of one or two windows."""
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in Decoder(model).parameters())
    one, two = (_kept(model, rows, train.bfloat16) for rows in (1, 2))
    row = two - one
    copies = max(0, one - row - 4 * parameters)
    layer = replace(model, layers=1)  # nothing is kept for a backward
    evaluated = _kept(layer, 2, bfloat16=False) - _kept(layer, 1, bfloat16=False)
    return Estimate(
        fixed=4 * 4 * parameters + copies,
        row=round(_RESIDENT * row),
        rows=train.rows,
        evaluation=_EVALUATED_ROWS * evaluated,
    )


def _kept(config: ModelConfig, rows: int, bfloat16: bool) -> int:
    """Bytes that the forward of `rows` windows keeps for the backward, weights among them."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with FakeTensorMode():
        model = Decoder(config)
        tokens = torch.zeros(rows, config.context, dtype=torch.long)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = model(tokens)
            F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        return sum(storage.nbytes() for storage in kept.values())


def available(root: Path = Path("/")) -> int:
    """Bytes that this process may still take, of the machine's and of its control groups'."""
    return min([psutil.virtual_memory().available, *_rooms(root)])


def _rooms(root: Path) -> Iterator[int]:
    """What is left of every limit of the control groups of this process."""
    for folder in cgroups(root, "memory"):
        for v1 in (False, True):
            with suppress(OSError, ValueError):  # of the other version, or without a limit
                yield _room(folder, v1)


def _room(folder: Path, v1: bool) -> int:
    limit = int((folder / ("memory.limit_in_bytes" if v1 else "memory.max")).read_text())
    used = int((folder / ("memory.usage_in_bytes" if v1 else "memory.current")).read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    cache = int(stat.get("total_inactive_file" if v1 else "inactive_file", 0))
    return max(0, limit - used + cache)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
