"""What a stream keeps, and what its next token takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.decoder import Block, Decoder
from model.patterns.pattern import Pattern, Place

_BYTES = 4  # state in float32
MOST_BYTES = 2**31
"""Bytes of state above which no step is timed: a machine may not have them."""
_TIMES = 5


@dataclass(frozen=True)
class Size:
    """A stream after `length` tokens."""

    length: int
    entries: tuple[int, ...]
    """Of each layer."""
    bytes: int
    """Of the state, in float32."""
    step_seconds: float
    """Of one more token, in PyTorch on as many threads as it has here; NaN if not timed."""


@torch.no_grad()
def size(model: Decoder, length: int) -> Size:
    """Of one stream of `model`. The time is the median of several steps over random state."""
    patterns = [block.pattern for block in model.blocks if isinstance(block, Block)]
    counted = tuple(_entries(pattern, length) for pattern in patterns)
    shapes = [
        {t.name: _shape(t.kind, t.shape, entries) for t in pattern.state()}
        for pattern, entries in zip(patterns, counted, strict=True)
    ]
    taken = sum(_BYTES * math.prod(shape) for layer in shapes for shape in layer.values())
    if taken > MOST_BYTES:
        return Size(length, counted, taken, float("nan"))
    state = [{name: torch.randn(shape) for name, shape in layer.items()} for layer in shapes]
    times = []
    for _ in range(1 + _TIMES):  # the first one is slower
        began = time.perf_counter()
        _step(model, state, length)
        times.append(time.perf_counter() - began)
    return Size(length, counted, taken, median(times[1:]))


def _entries(pattern: Pattern, length: int) -> int:
    """Valid entries of a layer's stacks after `length` tokens and the folds that they made due."""
    if pattern.schedule is None:
        return length
    (kept,) = {tensor.kept for tensor in pattern.state() if tensor.kind == "stack"}
    return pattern.schedule.entries(length, kept)


def _shape(kind: str, shape: tuple[int, ...], entries: int) -> tuple[int, ...]:
    return (1, shape[0], entries, *shape[2:]) if kind == "stack" else (1, *shape)


def _step(model: Decoder, state: list[dict[str, Tensor]], length: int) -> None:
    """One token at the end of a stream of `length` tokens. The oldest entries stay as they are."""
    positions = torch.tensor([[length - 1]])
    x = model.embed_at(torch.zeros_like(positions), positions)
    turn = model.rotary.turn_at(positions) if model.rotary is not None else None
    lengths = torch.tensor([length])
    remaining = iter(state)

    def attend(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        place = Place(positions, lengths, _push)
        return pattern.step(q, k, v, x, place, next(remaining))[0]

    for block in model.blocks:
        x = block(x, attend, turn)
    model.head(model.norm(x))


def _push(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *, window: int = 0
) -> tuple[Tensor, Any, Any]:
    """The kernel as one would write it for speed: the stacks are changed in place."""
    keys[:, :, -1:], values[:, :, -1:] = k, v
    if window:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    heads, groups = q.shape[1], keys.shape[1]
    grouped = q.reshape(q.shape[0], groups, heads // groups, q.shape[-1])
    mixed = (grouped @ keys.transpose(-1, -2)).softmax(-1) @ values
    return mixed.reshape(q.shape), keys, values
