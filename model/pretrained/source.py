"""Where a pretrained model comes from: its settings, and its tensors one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
class Vocabulary:
    """What is known of the tokens; nothing, if the source has no tokenizer."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of a bundle, by name: `tokenizer.json` and `chat_template.jinja`."""
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that the chat template has for them, such as `bos_token`."""
    begin_token: int | None = None
    """The token that the tokenizer puts before every text."""


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
    vocabulary: Vocabulary = Vocabulary()
