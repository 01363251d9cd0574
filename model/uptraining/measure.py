"""What a model loses by remembering less: loss by position, and pass keys found again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.decoder import Decoder
from model.uptraining.texts import Encode

_LOGITS = 256  # tokens whose logits are computed at once; a large vocabulary takes much memory
_DIGITS = 5
_PARTS = 4
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the text pass keys are told, as shares of it."""


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


@dataclass(frozen=True)
class Keys:
    """Pass keys of `length` tokens of text that were found again."""

    length: int
    digits_right: float
    """Share of the digits."""
    cases: int
    by_depth: tuple[float, ...] = ()
    """The same for each of DEPTHS; NaN where no key was told."""


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


@dataclass(frozen=True)
class KeyCase:
    """A text that names a pass key and, at its end, has it again."""

    tokens: Tensor
    """`[T]`, ending with those of the key."""
    key: int
    """How many tokens the key has."""
    depth: int
    """Which of DEPTHS it is told at."""


def key_cases(hay: Tensor, encode: Encode, count: int, seed: int = 0) -> list[KeyCase]:
    """`count` cases in rows of `hay[B, T]`, as long as these, with their keys at DEPTHS in turn."""
    rng, made, length = np.random.default_rng(seed), [], hay.shape[1]
    for number in range(count):
        row, at = hay[number % len(hay)], number % len(DEPTHS)
        key = "".join(str(digit) for digit in rng.integers(10, size=_DIGITS))
        told = _ids(encode, f"\nThe pass key is {key}. Remember it.\n")
        asked = _ids(encode, "\nWhat is the pass key? The pass key is ")
        answer = _ids(encode, key)
        around = length - len(told) - len(asked) - len(answer)
        depth = round(DEPTHS[at] * around)
        tokens = torch.cat((row[:depth], told, row[depth:around], asked, answer))
        made.append(KeyCase(tokens, len(answer), at))
    return made


@torch.no_grad()
def keys_found(model: Decoder, cases: Sequence[KeyCase]) -> Keys:
    """How many tokens of the keys are the most likely ones, each after those before it."""
    right, total = np.zeros(len(DEPTHS)), np.zeros(len(DEPTHS))
    for case in cases:
        hidden = _hidden(model, case.tokens[None, :-1])[:, -case.key :]
        chosen = model.head(model.norm(hidden))[0].argmax(-1)
        right[case.depth] += int((chosen == case.tokens[-case.key :]).sum())
        total[case.depth] += case.key
    shares = [float(a / b) if b else float("nan") for a, b in zip(right, total, strict=True)]
    return Keys(len(cases[0].tokens), float(right.sum() / total.sum()), len(cases), tuple(shares))


def _ids(encode: Encode, text: str) -> Tensor:
    return torch.from_numpy(np.array(encode(text), np.int64))


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
