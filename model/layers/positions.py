"""Where a token is: vectors added to its embedding, and angles that turn its queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.layers.architecture import Rope

if TYPE_CHECKING:
    from model.config import ModelConfig

Turn = Callable[[Tensor], Tensor]
"""Turns queries or keys `[B, T, heads, D]` by the angles of their positions."""


def make_positions(config: ModelConfig) -> nn.Module | None:
    """What `config` adds to the embeddings of tokens; None if it adds nothing."""
    if config.positions == "factored":
        return FactoredPositions(config)
    if config.positions == "sinusoid":
        return SinusoidPositions(config)
    return nn.Embedding(config.context, config.width) if config.positions == "learned" else None


class FactoredPositions(nn.Module):
    """Learned position embedding: that of the block plus that of the offset inside the block.

    For an image whose width is the span, these are the row and the column.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.span = config.span
        self.block = nn.Embedding(config.blocks, config.width)
        self.offset = nn.Embedding(config.span, config.width)

    def forward(self, positions: Tensor) -> Tensor:
        """Embeddings `[B, T, width]` of absolute positions `[B, T]`."""
        block = torch.div(positions, self.span, rounding_mode="floor")
        embedded: Tensor = self.block(block) + self.offset(positions - block * self.span)
        return embedded


class SinusoidPositions(nn.Module):
    """Fixed embedding as in the reference code, [all sines, all cosines], for any position."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        half = config.width // 2
        # Double: at position 10,000 a float32 angle is already off by 1e-3.
        frequencies = torch.exp(-math.log(1e4) * torch.arange(half).double() / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Embeddings `[B, T, width]` of absolute positions `[B, T]`."""
        angles = positions.unsqueeze(-1).to(self.frequencies.dtype) * self.frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RotaryPositions(nn.Module):
    """The angles of positions, as cosines and sines.

    Whoever trained with rotary positions multiplied in float32, and the model has learnt what comes
    of it; so the product is in float32 here, too, whatever the type of the rest.
    """

    frequencies: Tensor

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.scale = rope.scale
        numbers = torch.tensor(rope.frequencies, dtype=torch.float32)
        self.register_buffer("frequencies", numbers, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, T, pairs]` of absolute positions `[B, T]`, times the scale."""
        angles = positions.unsqueeze(-1).float() * self.frequencies.float()
        return angles.cos() * self.scale, angles.sin() * self.scale

    def turn_at(self, positions: Tensor) -> Turn:
        """What turns queries and keys of tokens at positions `[B, T]`."""
        cosines, sines = self(positions)
        return partial(turn, cosines=cosines, sines=sines)


def turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`x[B, T, heads, D]`, whose first 2P channels are turned by angles `[B, T, P]`."""
    pairs = cosines.shape[-1]
    cosines, sines = (y.unsqueeze(2).to(x.dtype) for y in (cosines, sines))
    one, other = x[..., :pairs], x[..., pairs : 2 * pairs]
    turned = (one * cosines - other * sines, other * cosines + one * sines)
    return torch.cat((*turned, x[..., 2 * pairs :]), dim=-1)
