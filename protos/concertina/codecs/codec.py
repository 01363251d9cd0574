"""What the tokens of a model stand for, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from concertina.codecs.token_text import Ids, TokenText


class Starts(Protocol):
    """The start tokens of a model."""

    def split(self, ids: Ids, label: str | None) -> tuple[int, Ids]:
        """The start token of a prompt, and the tokens after it. Raises PromptError."""

    def joined(self, start: int, ids: Ids) -> Ids:
        """The ids of the prompt that `split` makes this of."""

    def label_of(self, start: int) -> str | None:
        """The label that a start token stands for; None for one without."""

    def allows(self, start: int) -> bool:
        """Whether this is a start token."""


class Codec(Protocol):
    """Turns prompts into the tokens of a model, and its tokens into what is sent."""

    @property
    def size(self) -> int:
        """Number of tokens: ids are below it."""

    @property
    def takes(self) -> frozenset[str]:
        """The fields of a prompt that it can turn into tokens, besides ids."""

    @property
    def makes(self) -> str:
        """What tokens are, in messages: `text` or `images`."""

    @property
    def writes_text(self) -> bool:
        """Whether tokens are text, in which strings can be searched."""

    @property
    def is_bytewise(self) -> bool:
        """Whether each token of text is one byte with its number, so that strings are tokens."""

    @property
    def complete_at(self) -> int | None:
        """Number of tokens, prompt included, that make a stream complete; None if none does."""

    @property
    def starts(self) -> Starts:
        """The start tokens."""

    @property
    def text(self) -> TokenText:
        """The text that tokens stand for."""

    def from_text(self, text: str) -> Ids:
        """The tokens of a text. Raises PromptError."""

    def from_png(self, png: bytes) -> Ids:
        """The tokens of a picture. Raises PromptError."""

    def from_rgb(self, rgb: bytes) -> Ids:
        """The tokens of pixels with three bytes each. Raises PromptError."""

    def rgb(self, tokens: Iterable[int]) -> bytes:
        """The colours of tokens, three bytes each; empty if they are no pixels."""
