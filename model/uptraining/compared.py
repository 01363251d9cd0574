"""A folded model beside the full one, and beside sliding windows that keep as much."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from model.config import ModelConfig
from model.run import Checkpoint
from model.uptraining.choose import rival, share
from model.uptraining.keys import DEPTHS, Keys, key_texts, keys_found
from model.uptraining.measure import Losses, last_quarter, losses
from model.uptraining.sizes import Size, size
from model.uptraining.texts import Encode
from model.uptraining.weights import given_weights

Variant = Literal["full", "swapped", "folded", "window"]
TITLES: Mapping[Variant, str] = {
    "full": "full attention",
    "swapped": "folded, nothing fitted",
    "folded": "folded and fitted",
    "window": "first blocks and sliding windows",
}


@dataclass(frozen=True)
class Measured:
    """What one variant of the model does."""

    variant: Variant
    share: float
    """Of the state of full attention in the whole context."""
    losses: tuple[Losses, ...]
    keys: tuple[Keys, ...]
    sizes: tuple[Size, ...]
    """At these lengths, and in the whole context."""


@dataclass(frozen=True)
class Comparison:
    """All variants on the same held-out text."""

    measured: tuple[Measured, ...]
    window: ModelConfig
    """The model with sliding windows."""
    gain: float
    """By how much less the folded one loses than the windows, in the last quarter of the longest
    texts, in nats a token."""
    error: float
    """Standard error of this; NaN if there is one text only."""

    @property
    def folds_win(self) -> bool:
        """Whether the folded model loses less than windows that keep no less."""
        return self.gain > 0


def compare(
    checkpoint: Checkpoint,
    config: ModelConfig,
    numbers: Mapping[str, Any],
    hays: Sequence[Tensor],
    encode: Encode,
    on_variant: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Measure the model of `checkpoint`, folded as `config` says with these summaries.

    hays: windows of held-out text, one tensor `[B, T]` for each length, the longest last.
    """
    built, folding = config.architecture, config.architecture.folding
    assert folding is not None
    tangent = replace(built, folding=replace(folding, summary="tangent"))
    slides = rival(config)
    models: list[tuple[Variant, ModelConfig]] = [
        ("full", checkpoint.config),
        ("swapped", replace(config, architecture=tangent)),
        ("folded", config),
        ("window", slides),
    ]
    told = [key_texts(hay, encode) for hay in hays]
    lengths = sorted({hay.shape[1] for hay in hays} | {config.context})
    measured = []
    for variant, each in models:
        on_variant(TITLES[variant])
        model = checkpoint.model if variant == "full" else given_weights(each, checkpoint.model)
        if variant == "folded":
            model = given_weights(each, checkpoint.model, numbers)
        measured.append(
            Measured(
                variant,
                1.0 if variant == "full" else share(each),
                tuple(losses(model, hay) for hay in hays),
                tuple(keys_found(model, some) for some in told),
                tuple(size(model, length) for length in lengths),
            )
        )
    by_name = {each.variant: each.losses[-1] for each in measured}
    gain, error = last_quarter(by_name["window"], by_name["folded"])
    return Comparison(tuple(measured), slides, gain, error)


def metrics_of(found: Comparison) -> dict[str, float]:
    """All that was measured, by names that a manifest may have."""
    named = {}
    for each in found.measured:
        for loss in each.losses:
            named[f"{each.variant}_nats_{loss.length}"] = loss.mean
            named[f"{each.variant}_last_quarter_nats_{loss.length}"] = loss.parts[-1]
        for keys in each.keys:
            named[f"{each.variant}_keys_{keys.length}"] = keys.digits_right
            for depth, right in zip(DEPTHS, keys.by_depth, strict=True):
                named[f"{each.variant}_keys_{keys.length}_at_{depth:.0%}"] = right
        for kept in each.sizes:
            named[f"{each.variant}_entries_{kept.length}"] = float(sum(kept.entries))
            named[f"{each.variant}_bytes_{kept.length}"] = float(kept.bytes)
            named[f"{each.variant}_step_ms_{kept.length}"] = 1000 * kept.step_seconds
    return {name: value for name, value in named.items() if math.isfinite(value)}


def verdict(found: Comparison) -> str:
    """Which one wins, in a sentence."""
    length = found.measured[0].losses[-1].length
    winner, other = ("folds", "windows") if found.folds_win else ("windows", "folds")
    known = not math.isnan(found.error)
    spread = f" ± {2 * found.error:.3f}" if known else ""
    clear = known and abs(found.gain) > 2 * found.error
    return (
        f"{winner} lose {abs(found.gain):.3f}{spread} nats a token less than {other} that keep as "
        f"much, in the last quarter of {length:,} tokens"
        + ("" if clear else "; that is not clear of chance")
    )
