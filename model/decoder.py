"""A pre-norm decoder-only transformer; its config chooses the attention pattern."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.patterns import make_pattern
from model.patterns.pattern import Pattern

Attend = Callable[[Pattern, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps a pattern, q, k, v `[B, H, T, D]` and the input `[B, T, width]` to `[B, H, T, D]`."""


class Block(nn.Module):
    """One layer: attention and a squared-ReLU MLP, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = config.head_dim**-0.5
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)
        self.pattern = make_pattern(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Input `[B, T, width]` to output of the same shape; `attend` runs the layer's pattern."""
        return self.add(x, self.mix(x, attend))

    def mix(self, x: Tensor, attend: Attend) -> Tensor:
        """Output of attention, before its projection, for the layer's input `[B, T, width]`."""
        batch, length, width = x.shape
        normed = self.norm_attention(x)
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(normed).split(width, dim=-1)
        )
        mixed = attend(self.pattern, q * self.scale, k, v, normed)
        return mixed.transpose(1, 2).reshape(batch, length, width)

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output, from its input `[..., width]` and the output of `mix` for it."""
        x = x + self.dropout(self.out(mixed))
        hidden = F.relu(self.up(self.norm_mlp(x)))
        after: Tensor = x + self.dropout(self.down(hidden * hidden))
        return after


class Decoder(nn.Module):
    """Maps token ids to next-token logits. Absolute positions are added once, at the input."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary + config.starts, config.width)
        self.positions = (
            FactoredPositions(config)
            if config.positions == "factored"
            else SinusoidPositions(config)
        )
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)
        self.dropout = nn.Dropout(dropout)
        self.apply(_initialise)

    def embed_at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer, `[B, T, width]`, for tokens at absolute positions `[B, T]`."""
        token: Tensor = self.embed(tokens)
        position: Tensor = self.positions(positions)
        return token + position.to(token.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits `[B, T, vocabulary]` for all of `tokens[B, T]` in parallel."""
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"{tokens.shape[1]} tokens exceed the context of {self.config.context}"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.dropout(self.embed_at(tokens, positions))
        for block in self.blocks:
            x = block(x, _in_parallel)
        logits: Tensor = self.head(self.norm(x))
        return logits


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


def _in_parallel(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    out: Tensor = pattern(q, k, v, x)
    return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
    elif isinstance(module, Block):  # visited after its parts: a new layer is the identity
        nn.init.zeros_(module.out.weight)
        nn.init.zeros_(module.down.weight)
