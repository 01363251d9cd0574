"""The configuration of a decoder. It is stored with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from model.layers.architecture import OURS, Architecture, Folding

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
Positions = Literal["factored", "sinusoid", "learned", "none"]

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
    architecture: Architecture = OURS

    def __post_init__(self) -> None:
        least_starts = 1 if self.architecture == OURS else 0
        for name in ("vocabulary", "width", "layers", "heads", "mlp", "starts"):
            least = least_starts if name == "starts" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("context", "span"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.architecture.head_dim is None and self.width % (8 * self.heads):
            raise ValueError(
                f"width is {self.width} with {self.heads} heads: it must be a multiple of "
                f"{8 * self.heads}, as the decode kernel needs a head_dim that is a multiple of 8"
            )
        self._check_heads()
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

    def _check_heads(self) -> None:
        built = self.architecture
        if self.head_dim % 8:
            raise ValueError(
                f"head_dim is {self.head_dim}: it must be a multiple of 8 for the decode kernel"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads is {self.kv_heads}: {self.heads} heads cannot share them evenly"
            )
        if built.tied and self.starts:
            raise ValueError("tied embeddings leave no room for start tokens: starts must be 0")
        if built.rope is not None and not 0 < 2 * len(built.rope.frequencies) <= self.head_dim:
            raise ValueError(
                f"rope turns {2 * len(built.rope.frequencies)} channels of a head, which has "
                f"{self.head_dim}"
            )
        if built.windows and len(built.windows) != self.layers:
            raise ValueError(f"windows has {len(built.windows)} layers of {self.layers}")
        for name in ("kv_heads", "rope", "windows", "folding"):
            if getattr(built, name) and self.attention != "full":
                raise ValueError(f"{name} needs full attention, and attention is {self.attention}")
        if built.folding is not None:
            self._check_folding(built.folding)

    def _check_folding(self, folding: Folding) -> None:
        if len(folding.layers) != self.layers:
            raise ValueError(f"folding has {len(folding.layers)} layers of {self.layers}")
        if self.context < self.span:
            raise ValueError(
                f"context {self.context} is shorter than one block of {self.span} tokens: folding "
                "needs a span of at most the context"
            )
        for layer, window in enumerate(self.architecture.windows):
            if window and folding.layers[layer] != "full":
                raise ValueError(
                    f"layer {layer} attends to the newest {window} tokens only, so that it cannot "
                    f"be {folding.layers[layer]}: leave it full"
                )

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The config that `stored` gave; settings that did not exist then have their defaults."""
        fields = dict(raw)
        if "architecture" in fields:
            fields["architecture"] = Architecture.read(fields["architecture"])
        return cls(**fields)

    def stored(self) -> dict[str, Any]:
        """The content, for JSON. The architecture is left out where it is ours."""
        fields = asdict(self)
        if self.architecture == OURS:
            del fields["architecture"]
        return fields

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.architecture.head_dim or self.width // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.architecture.kv_heads or self.heads

    @property
    def masked(self) -> bool:
        """Whether tokens attend to later ones; then training masks the tokens to predict."""
        return self.attention == "fixed-bidirectional"

    @property
    def blocks(self) -> int:
        """Number of blocks of `span` tokens in the context; the last one may be incomplete."""
        return -(-self.context // self.span)
