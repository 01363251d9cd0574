"""A pre-norm decoder-only transformer; its config chooses pattern and parts of its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.mlp import activate
from model.layers.norm import make_norm
from model.layers.positions import RotaryPositions, Turn, make_positions
from model.patterns import make_pattern
from model.patterns.pattern import Pattern

Attend = Callable[[Pattern, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps a pattern, q, k, v `[B, H, T, D]` and the input `[B, T, width]` to `[B, H, T, D]`."""


class Block(nn.Module):
    """One layer: attention and an MLP, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, dropout: float, layer: int = 0) -> None:
        super().__init__()
        built, dim = config.architecture, config.head_dim
        self.built, self.dim = built, dim
        self.scale = dim**-0.5
        self.turns = layer not in built.unturned
        self.sizes = [heads * dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        biased = {part: part in built.biases for part in ("qkv", "out", "mlp")}
        self.norm_attention = make_norm(built, config.width)
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=biased["qkv"])
        self.out = nn.Linear(config.heads * dim, config.width, bias=biased["out"])
        self.norm_mlp = make_norm(built, config.width)
        hidden = 2 * config.mlp if built.gated else config.mlp
        self.up = nn.Linear(config.width, hidden, bias=biased["mlp"])
        self.down = nn.Linear(config.mlp, config.width, bias=biased["mlp"])
        if built.head_norms:
            self.norm_queries, self.norm_keys = make_norm(built, dim), make_norm(built, dim)
        self.pattern = make_pattern(config, layer)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend, turn: Turn | None = None) -> Tensor:
        """Input `[B, T, width]` to output of the same shape; `attend` runs the layer's pattern.

        turn: what turns queries and keys by their positions; None if nothing does.
        """
        return self.add(x, self.mix(x, attend, turn))

    def mix(self, x: Tensor, attend: Attend, turn: Turn | None = None) -> Tensor:
        """Output of attention, before its projection, for the layer's input `[B, T, width]`."""
        batch, length, _ = x.shape
        normed = self.norm_attention(x)
        q, k, v = (
            part.view(batch, length, part.shape[-1] // self.dim, self.dim)
            for part in self.qkv(normed).split(self.sizes, dim=-1)
        )
        if self.built.head_norms:
            q, k = self.norm_queries(q), self.norm_keys(k)
        if turn is not None and self.turns:
            q, k = turn(q), turn(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = attend(self.pattern, q * self.scale, k, v, normed)
        return mixed.transpose(1, 2).reshape(batch, length, self.sizes[0])

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output, from its input `[..., width]` and the output of `mix` for it."""
        attended = x + self.dropout(self.out(mixed))
        normed = self.norm_mlp(x if self.built.parallel else attended)
        hidden = activate(self.up(normed), self.built.activation, self.built.gated)
        after: Tensor = attended + self.dropout(self.down(hidden))
        return after


class Decoder(nn.Module):
    """Maps token ids to next-token logits. Absolute positions are added once, at the input, or turn
    the queries and keys of every layer.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, built = config, config.architecture
        self.embed = nn.Embedding(config.vocabulary + config.starts, config.width)
        self.positions = make_positions(config)
        self.blocks = nn.ModuleList(Block(config, dropout, n) for n in range(config.layers))
        self.norm = make_norm(built, config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias="head" in built.biases)
        self.rotary = None if built.rope is None else RotaryPositions(built.rope)
        self.dropout = nn.Dropout(dropout)
        self.apply(_initialise)
        if built.tied:
            self.head.weight = self.embed.weight

    def embed_at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer, `[B, T, width]`, for tokens at absolute positions `[B, T]`."""
        token: Tensor = self.embed(tokens)
        if self.positions is None:
            return token
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
        turn = self.rotary.turn_at(positions) if self.rotary is not None else None
        for block in self.blocks:
            x = block(x, _in_parallel, turn)
        logits: Tensor = self.head(self.norm(x))
        return logits


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
