"""What a model loses by remembering less: loss by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.decoder import Decoder

_LOGITS = 256  # tokens whose logits are computed at once; a large vocabulary takes much memory
_PARTS = 4


@dataclass(frozen=True)
class Losses:
    """Loss in nats per token of windows of one length."""

    length: int
    parts: tuple[float, ...]
    """Of the first quarter of the window, the second, and so on."""
    last_by_window: tuple[float, ...]
    """Of the last quarter, for each window."""

    @property
    def mean(self) -> float:
        return sum(self.parts) / len(self.parts)


@torch.no_grad()
def losses(model: Decoder, tokens: Tensor) -> Losses:
    """Of windows `[B, T]`; each token but the first is predicted from those before it."""
    by_window = torch.stack([_losses_of(model, row[None]) for row in tokens])
    ends = [round(n * by_window.shape[1] / _PARTS) for n in range(_PARTS + 1)]
    parts = [by_window[:, a:b].mean(1) for a, b in pairwise(ends)]
    return Losses(
        tokens.shape[1],
        tuple(float(part.mean()) for part in parts),
        tuple(parts[-1].tolist()),
    )


def last_quarter(one: Losses, other: Losses) -> tuple[float, float]:
    """By how much `one` loses more than `other` in the last quarter, and the standard error."""
    pairs = zip(one.last_by_window, other.last_by_window, strict=True)
    difference = np.array([a - b for a, b in pairs])
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    return float(difference.mean()), spread / len(difference) ** 0.5


def _hidden(model: Decoder, tokens: Tensor) -> Tensor:
    """Output of the last layer, `[B, T, width]`."""
    positions = torch.arange(tokens.shape[1])[None]
    x = model.embed_at(tokens, positions)
    turn = model.rotary.turn_at(positions) if model.rotary is not None else None
    for block in model.blocks:
        x = block(x, _as_it_is, turn)
    return x


def _losses_of(model: Decoder, tokens: Tensor) -> Tensor:
    hidden, targets = _hidden(model, tokens[:, :-1]), tokens[:, 1:]
    parts = []
    for begin in range(0, targets.shape[1], _LOGITS):
        logits = model.head(model.norm(hidden[:, begin : begin + _LOGITS]))
        wanted = targets[:, begin : begin + _LOGITS]
        parts.append(F.cross_entropy(logits[0], wanted[0], reduction="none"))
    return torch.cat(parts)


def _as_it_is(pattern: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return pattern(q, k, v, x)
