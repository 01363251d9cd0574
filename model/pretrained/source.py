"""Where a pretrained model comes from: its settings, and its tensors one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Settings = Mapping[str, Any]
"""The content of a Hugging Face config.json; a GGUF file's settings are put in these words."""

UNKNOWN_LICENSE = "NOASSERTION"
"""SPDX's word for a licence that nobody has named."""


class PretrainedError(ValueError):
    """A model that cannot be converted. The message names what is wrong with it, and where."""


class Tensors(Protocol):
    """The tensors of a model, by their Hugging Face names. None is read before it is asked for."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if there is no such tensor."""

    def read(self, name: str) -> Tensor:
        """A tensor, in the type that it is stored in, or in float32 if it is stored in blocks."""

    def names(self) -> list[str]:
        """The names of all tensors."""


@dataclass(frozen=True)
class Source:
    """A pretrained model that lies on disk."""

    path: Path
    settings: Settings
    tensors: Tensors
    files: tuple[Path, ...]
    """What holds the weights."""
    license: str
    """SPDX identifier, as far as the source names one."""
    divisors: tuple[float, ...] = ()
    """What the frequencies of the rotary positions are divided by, pair by pair; empty: nothing."""
    extras: tuple[Path, ...] = ()
    """Files that say what tokens mean, to be kept beside the weights."""
