"""The shape of a decoder, as one frozen record that travels with its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["fixed", "full"]
Positions = Literal["factored", "sinusoid"]


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
        if self.attention not in ("fixed", "full"):
            raise ValueError(f"attention must be 'fixed' or 'full', got {self.attention!r}")
        if self.positions not in ("factored", "sinusoid"):
            raise ValueError(f"positions must be 'factored' or 'sinusoid', got {self.positions!r}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def blocks(self) -> int:
        """Number of blocks of `span` tokens that the context touches."""
        return -(-self.context // self.span)

    @property
    def entries(self) -> int:
        """Most entries the stack of one layer ever holds for one stream."""
        if self.attention == "full":
            return self.context
        return self.blocks - 1 + min(self.span, self.context)
