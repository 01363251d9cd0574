"""The configuration of a decoder. It is stored with every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Attention = Literal[
    "full",
    "fixed",
    "fixed-bidirectional",
    "logsparse",
    "logsparse-hierarchical",
    "axial-rowmajor",
    "axial-vertical",
    "axial-horizontal",
    "mixture",
    "mixture-averaged",
    "sparse-fixed",
    "sparse-strided",
    "sparse-logsparse",
    "sparse-axial",
]
Pooling = Literal["max", "mean", "deepset-max"]
Positions = Literal["factored", "sinusoid"]

ROWS: tuple[Attention, ...] = (
    "axial-rowmajor",
    "axial-vertical",
    "axial-horizontal",
    "mixture",
    "mixture-averaged",
    "sparse-axial",
)
"""Patterns that arrange tokens in a grid; each row of it is a block of `span` tokens."""
_BLOCKS = ("fixed", "fixed-bidirectional", "sparse-fixed", "sparse-strided")


@dataclass(frozen=True)
class ModelConfig:
    """All settings that define the function of a model, besides its weights.

    The model predicts ids `0 … vocabulary - 1`. Ids `vocabulary … vocabulary + starts - 1` are
    start tokens, used at position 0 only: the first one is unconditional, the others are labels.
    """

    vocabulary: int
    context: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 1024
    span: int = 64
    attention: Attention = "fixed"
    positions: Positions = "factored"
    starts: int = 1
    pooling: Pooling = "max"

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "mlp", "starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("context", "span"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.width % (8 * self.heads):
            raise ValueError(
                f"width is {self.width} with {self.heads} heads: it must be a multiple of "
                f"{8 * self.heads}, as the decode kernel needs a head_dim that is a multiple of 8"
            )
        for name, choices in (
            ("attention", get_args(Attention)),
            ("positions", get_args(Positions)),
            ("pooling", get_args(Pooling)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if self.pooling != "max" and self.attention not in ("fixed", "fixed-bidirectional"):
            raise ValueError(
                f"pooling is {self.pooling}, but {self.attention} has no pooling; only fixed "
                "attention has"
            )
        if self.attention in _BLOCKS and self.context < self.span:
            raise ValueError(
                f"context {self.context} is shorter than one block of {self.span} tokens: "
                f"{self.attention} needs a span of at most the context"
            )
        if self.attention in ROWS and (self.context % self.span or self.blocks < 2):
            raise ValueError(
                f"context {self.context} is not two or more whole rows of {self.span} tokens: "
                f"{self.attention} needs a context that is a multiple of the span"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def masked(self) -> bool:
        """Whether tokens attend to later ones; then training masks the tokens to predict."""
        return self.attention == "fixed-bidirectional"

    @property
    def blocks(self) -> int:
        """Number of blocks of `span` tokens in the context; the last one may be incomplete."""
        return -(-self.context // self.span)
