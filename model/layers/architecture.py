"""How the layers of a decoder are built. The defaults are those of our own models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Normalisation = Literal["layer", "rms"]
Activation = Literal["squared-relu", "relu", "silu", "gelu", "gelu-tanh"]
Biased = Literal["qkv", "out", "mlp", "head"]
LayerAttention = Literal["full", "fold", "window"]
Summary = Literal["max", "tangent", "fitted"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions: pairs of channels of queries and keys turn with the position.

    Channel c is paired with channel c + P, where P is the number of pairs; the channels behind the
    first 2P stay as they are.
    """

    frequencies: tuple[float, ...]
    """Radians by which each pair turns from a token to the next; float32 numbers."""
    scale: float = 1.0
    """Factor of what was turned; yarn sharpens attention by it."""


@dataclass(frozen=True)
class Folding:
    """Which layers of a model that was trained with full attention remember less.

    Such a layer keeps the first `sink` blocks, the newest `window` complete ones and the open one.
    A block that leaves the window is folded into one entry, or dropped.
    """

    layers: tuple[LayerAttention, ...]
    """For each layer: all tokens stay, old blocks are folded, or dropped."""
    sink: int = 1
    window: int = 3
    summary: Summary = "tangent"
    """How a block is folded."""

    def __post_init__(self) -> None:
        for layer, attention in enumerate(self.layers):
            if attention not in get_args(LayerAttention):
                raise ValueError(
                    f"folding of layer {layer} must be one of "
                    f"{', '.join(get_args(LayerAttention))}; got {attention!r}"
                )
        if self.summary not in get_args(Summary):
            raise ValueError(
                f"summary must be one of {', '.join(get_args(Summary))}; got {self.summary!r}"
            )
        for name in ("sink", "window"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 blocks or more, got {getattr(self, name)}")
        if {*self.layers} <= {"full"}:
            raise ValueError(
                "folding leaves every layer full: name layers to fold, or leave it out"
            )
        if "fold" not in self.layers and not self.window:
            raise ValueError("window must be at least 1 block where no layer folds, got 0")


@dataclass(frozen=True)
class Architecture:
    """What layers have besides their sizes and their attention pattern."""

    kv_heads: int | None = None
    """Heads of keys and values, each shared by as many heads of queries. None: as many as heads."""
    head_dim: int | None = None
    """Channels of a head. None: the width divided by the heads."""
    norm: Normalisation = "layer"
    epsilon: float = 1e-5
    activation: Activation = "squared-relu"
    gated: bool = False
    """Whether the activation of one half of the MLP's channels is a factor of the other half."""
    parallel: bool = False
    """Whether the MLP reads what attention reads, and not what attention gives."""
    head_norms: bool = False
    """Whether the queries and keys of each head are normalised."""
    biases: tuple[Biased, ...] = ("head",)
    """Which matrices have a bias."""
    tied: bool = False
    """Whether the logits are products with the embeddings of the tokens."""
    rope: Rope | None = None
    unturned: tuple[int, ...] = ()
    """Layers that take no part in `rope`."""
    windows: tuple[int, ...] = ()
    """For each layer, how many of the newest tokens are attended to; 0 means all. Empty: all."""
    folding: Folding | None = None
    """None: every layer keeps all tokens."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("norm", get_args(Normalisation)),
            ("activation", get_args(Activation)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if unknown := sorted({*self.biases} - {*get_args(Biased)}):
            raise ValueError(f"biases must be of {', '.join(get_args(Biased))}; got {unknown[0]!r}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must be above 0 and below 1, got {self.epsilon}")
        for name in ("kv_heads", "head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.windows, default=0) < 0:
            raise ValueError(f"windows must be 0 or more, got {min(self.windows)}")

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Architecture:
        """The architecture that `raw`, out of JSON, is the content of."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        if rope := fields.get("rope"):
            fields["rope"] = Rope(tuple(rope["frequencies"]), rope["scale"])
        if folding := fields.get("folding"):
            fields["folding"] = Folding(**{**folding, "layers": tuple(folding["layers"])})
        return cls(**fields)


OURS = Architecture()
"""What `concertina train` builds."""
