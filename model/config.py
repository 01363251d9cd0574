"""The shape of a decoder, as one frozen record that travels with its checkpoint."""

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
"""Patterns that see tokens as a grid, whose rows are blocks of `span` tokens."""
_BLOCKS = ("fixed", "fixed-bidirectional", "sparse-fixed", "sparse-strided")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides which function a checkpoint computes.

    Ids `0 … vocabulary - 1` are predicted. Ids `vocabulary … vocabulary + starts - 1` are start
    tokens: they only ever stand at position 0, the first is the unconditional one, the others are
    labels (research: `combiner.md` section 2, the autoregressive shift).
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
                f"width {self.width} over {self.heads} heads: the kernel that serves needs a "
                f"head_dim that is a multiple of 8, so a width that is one of {8 * self.heads}"
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
                f"pooling {self.pooling} is an option of fixed attention; {self.attention} has none"
            )
        if self.attention in _BLOCKS and self.context < self.span:
            raise ValueError(
                f"a context of {self.context} does not reach one block of {self.span} tokens: "
                f"{self.attention} needs a span of at most the context"
            )
        if self.attention in ROWS and (self.context % self.span or self.blocks < 2):
            raise ValueError(
                f"a context of {self.context} is not two or more whole rows of {self.span} tokens: "
                f"{self.attention} needs a context that is a multiple of the span"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def masked(self) -> bool:
        """Whether a token reads later ones, so that training has to hide what it asks for."""
        return self.attention == "fixed-bidirectional"

    @property
    def blocks(self) -> int:
        """Number of blocks of `span` tokens that the context touches."""
        return -(-self.context // self.span)
