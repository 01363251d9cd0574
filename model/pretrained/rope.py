"""The frequencies of rotary positions, out of the settings of a pretrained model.

Every formula is computed in float32 and in the order of transformers, so that each frequency is the
very number that the model was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from concertina.shown import shown
from model.layers.architecture import Rope
from model.pretrained.source import PretrainedError, Settings

_BASE = 10_000.0


def make_rope(
    settings: Settings,
    head_dim: int,
    *,
    base: float = _BASE,
    share: float = 1.0,
    divisors: Sequence[float] = (),
) -> Rope:
    """The rotary positions that `settings` describe, in the words of any release of transformers.

    base, share: the base of the frequencies and the share of a head's channels that turn, where the
    settings do not say. divisors: what each frequency is divided by at the end; none if empty.
    Raises PretrainedError for a kind of scaling that is not supported.
    """
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise PretrainedError(f"rope_scaling is {shown(given)}: it must be a table of settings")
    merged = {
        "rope_theta": settings.get("rope_theta", base),
        "partial_rotary_factor": settings.get("partial_rotary_factor", share),
        "original_max_position_embeddings": settings.get("max_position_embeddings"),
        **{name: value for name, value in given.items() if value is not None},
    }
    if settings.get("original_max_position_embeddings"):
        name = "original_max_position_embeddings"
        merged[name] = settings[name]
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind not in [*_KINDS]:
        raise PretrainedError(
            f"rope_type is {shown(kind)}; supported are {', '.join(_KINDS)}: this model cannot be "
            "converted"
        )
    channels = int(head_dim * _number(merged, "partial_rotary_factor"))
    if channels % 2 or not 0 < channels <= head_dim:
        raise PretrainedError(f"{channels} channels of {head_dim} turn: they have to be pairs")
    pairs = channels // 2
    exponents = torch.arange(0, 2 * pairs, 2, dtype=torch.int64).float() / (2 * pairs)
    powers = _number(merged, "rope_theta") ** exponents
    frequencies, scale = _KINDS[kind](merged, powers, settings)
    if divisors:
        if len(divisors) != pairs:
            raise PretrainedError(f"there are {len(divisors)} rope factors for {pairs} pairs")
        frequencies = frequencies / torch.tensor(divisors, dtype=torch.float32)
    if not torch.isfinite(frequencies).all() or not math.isfinite(scale):
        raise PretrainedError("the frequencies of the rotary positions are not finite numbers")
    return Rope(tuple(frequencies.tolist()), scale)


def _number(given: dict[str, Any], name: str) -> float:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise PretrainedError(
            f"{name} of the rotary positions is {shown(value)}: it must be above 0"
        )
    return float(value)


def _plain(given: dict[str, Any], powers: Tensor, settings: Settings) -> tuple[Tensor, float]:
    return 1.0 / powers, 1.0


def _linear(given: dict[str, Any], powers: Tensor, settings: Settings) -> tuple[Tensor, float]:
    return 1.0 / powers / _number(given, "factor"), 1.0


def _llama3(given: dict[str, Any], powers: Tensor, settings: Settings) -> tuple[Tensor, float]:
    """Slow pairs turn slower by a factor, fast ones as before, and those between in between."""
    factor, low, high, before = (
        _number(given, name)
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    plain = 1.0 / powers
    lengths = 2 * math.pi / plain
    slowed = torch.where(lengths > before / low, plain / factor, plain)
    share = (before / lengths - low) / (high - low)
    between = (1 - share) * slowed / factor + share * slowed
    is_between = ~(lengths < before / high) & ~(lengths > before / low)
    return torch.where(is_between, between, slowed), 1.0


def _yarn(given: dict[str, Any], powers: Tensor, settings: Settings) -> tuple[Tensor, float]:
    """Pairs that turn often enough within the trained context turn as before, others slower."""
    before = _number(given, "original_max_position_embeddings")
    base, channels = _number(given, "rope_theta"), 2 * len(powers)
    factor = given.get("factor")
    if factor is None:
        factor = _number(dict(settings), "max_position_embeddings") / before
    scale = given.get("attention_factor")
    if scale is None:
        one, other = given.get("mscale"), given.get("mscale_all_dim")
        scale = _sharpness(factor, one) / _sharpness(factor, other) if one and other else None
    if scale is None:
        scale = _sharpness(factor)

    def channel(turns: float) -> float:
        return (channels * math.log(before / (turns * 2 * math.pi))) / (2 * math.log(base))

    low, high = channel(given.get("beta_fast") or 32), channel(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(len(powers), dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(scale)


def _sharpness(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


_KINDS: dict[str, Callable[[dict[str, Any], Tensor, Settings], tuple[Tensor, float]]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
